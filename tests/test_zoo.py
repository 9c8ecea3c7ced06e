"""The zoo as part of the installed package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from conftest import write_config
from timm.models import get_pretrained_cfg
from training import run

import timm_iebn
from timm_iebn import zoo
from timm_iebn.zoo import WEIGHTS, hub_id, list_zoo, read_zoo

ROOT = Path(__file__).parents[1]
LOAD_ALL = """
import timm, timm_iebn
models = timm_iebn.list_zoo()
for model in models:
    timm.create_model(model.name, pretrained=True)
print(timm_iebn.__file__, *[model.name for model in models], sep="\\n")
"""


def test_the_zoo_is_registered_and_listed():
    folders = [folder for folder in read_zoo() if (folder / WEIGHTS).exists()]
    assert folders
    for folder in folders:
        cfg = get_pretrained_cfg(folder.name)
        assert cfg.file == str(folder / WEIGHTS) and cfg.hf_hub_id == f"timm-iebn/{folder.name}" == hub_id(folder)
        assert folder.name in timm.list_pretrained()
        assert (folder / WEIGHTS).stat().st_size < 8_000_000  # what may be in git
        (model,) = list_zoo(folder.name)
        network = timm.create_model(folder.name, pretrained=True)
        assert network.num_classes == cfg.num_classes and len(network.pretrained_cfg["label_names"]) == cfg.num_classes
        assert model.parameters == sum(p.numel() for p in network.parameters())
        assert 0 < model.top1 <= model.top5 <= 100 and model.macs > model.parameters


def test_a_name_and_its_folder_give_the_same_network():
    folder = [*read_zoo()][0]
    x = torch.randn(2, 3, 32, 32)
    one, other = (timm.create_model(n, pretrained=True).eval() for n in (folder.name, f"local-dir:{folder}"))
    assert torch.equal(one(x), other(x))


def test_the_default_is_the_longest_training_then_the_lowest_seed(tmp_path):
    def add(name, epochs, seed, pretrained=False, **more):
        name = f"net.{name}"
        (tmp_path / name).mkdir()
        write_config(tmp_path / name, "net", epochs=epochs, seed=seed, pretrained=pretrained, **more)

    add("a", 60, 1)
    add("b", 164, 2)
    add("c", 200, 0, pretrained=True)
    add("d", 164, 0)
    add("e", 300, 0, is_study=True)
    assert [folder.name for folder in read_zoo(tmp_path)] == ["net.d", "net.b", "net.a", "net.c", "net.e"]


@pytest.mark.parametrize(
    "config",
    [
        "{",
        "[]",
        "{}",
        '{"architecture": "net"}',
        '{"architecture": "other", "training": 1}',
        "[" * 100_000,
        '{"a": NaN}',
    ],
    ids=lambda config: config[:30],
)
def test_a_folder_of_others_is_left_out_with_a_warning(copied_zoo, config):
    other = copied_zoo.parent / "other.tag"
    other.mkdir()
    (other / "config.json").write_text(config)
    with pytest.warns(UserWarning, match="other.tag is left out"):
        assert [*read_zoo(copied_zoo.parent)] == [copied_zoo]


@pytest.mark.parametrize("changes", [dict(seed="0"), dict(epochs=None), dict(pretrained=1), dict(test_top1="high")])
def test_a_config_json_of_another_shape_does_not_break_the_import(tmp_path, changes):
    (tmp_path / "net.a").mkdir()
    write_config(tmp_path / "net.a", "net", seed=1)
    (tmp_path / "net.b").mkdir()
    write_config(tmp_path / "net.b", "net", **changes)
    with pytest.warns(UserWarning, match=f"net.b is left out .*{next(iter(changes))!r} should be of type"):
        assert [folder.name for folder in read_zoo(tmp_path)] == ["net.a"]


@pytest.mark.parametrize("damage", ["architecture,speed\nnet,1\n", "cut", "longer"])
def test_a_damaged_cost_csv_is_named(damage, tmp_path):
    whole = (zoo.ZOO / "cost.csv").read_text()
    text = dict(cut=whole[: whole.rindex(",")] + "\n", longer=whole.rstrip() + ",1\n").get(damage, damage)
    (tmp_path / "cost.csv").write_text(text)
    with pytest.raises(ValueError, match="cost.csv is not as zoo_cost.py writes it"):
        zoo.read_costs(tmp_path / "cost.csv")


def test_the_costs_of_networks_are_measured_and_those_of_others_stay(tmp_path):
    path = tmp_path / "cost.csv"
    path.write_text("architecture,input_size,parameters,macs,device,batch_size,images_per_second,torch,date\n")
    with open(path, "a") as file:
        file.write("resnet20_cifar,3x32x32,1,2,another,128,9.5,2.14,2026-11-25\n")
    args = ["resnet32_cifar*", "--output", path, "--repeats", "1", "--batch-size", "2"]
    result = run(*args, cwd=tmp_path, script="zoo_cost.py")
    assert result.returncode == 0, result.stderr
    first, *measured = sorted(zoo.read_costs(path), key=lambda cost: cost.device != "another")
    assert first == zoo.Cost("resnet20_cifar", "3x32x32", 1, 2, "another", 128, 9.5, "2.14", "2026-11-25")
    assert all(cost.images_per_second > 0 for cost in measured)
    assert {cost.architecture for cost in measured} == {f"resnet32_cifar{norm}" for norm in ("", "_iebn", "_se")}
    shipped = {cost[:4] for cost in zoo.read_costs()}
    assert {cost[:4] for cost in measured} <= shipped


@pytest.fixture
def copied_zoo(tmp_path, monkeypatch):
    """A zoo of one network, whose files a test may change."""
    folder = tmp_path / [*read_zoo()][0].name
    shutil.copytree([*read_zoo()][0], folder)
    monkeypatch.setattr(zoo, "ZOO", tmp_path)
    return folder


def test_shipped_weights_are_checked(copied_zoo):
    weights = copied_zoo / WEIGHTS
    overlay = dict(pretrained_cfg_overlay=dict(file=str(weights)))
    timm.create_model(copied_zoo.name, pretrained=True, **overlay)
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    with pytest.raises(RuntimeError, match="model.safetensors is damaged .*install timm-iebn again"):
        timm.create_model(copied_zoo.name, pretrained=True, **overlay)


def test_shipped_weights_are_checked_by_a_relative_name_too(copied_zoo, monkeypatch):
    (copied_zoo / WEIGHTS).write_bytes(b"damaged")
    monkeypatch.chdir(copied_zoo.parent)
    with pytest.raises(RuntimeError, match="model.safetensors is damaged .*install timm-iebn again"):
        zoo.check_weights(Path(copied_zoo.name, WEIGHTS))


def test_the_namespace_can_be_changed(monkeypatch):
    monkeypatch.setenv("TIMM_IEBN_NAMESPACE", "lab")
    assert hub_id(Path("somewhere/net.tag")) == "lab/net.tag"
    assert hub_id(Path("somewhere/net.tag"), "me") == "me/net.tag"


def test_the_wheel_brings_the_weights(tmp_path):
    """Built from the sources that git would have, installed elsewhere, loaded without a network."""
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(".*", "output", "build", "*.egg-info", "__pycache__", "*.so", "tests")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    for command in (
        ["wheel", "--no-deps", "-w", tmp_path, source],
        ["install", "--no-deps", "--target", tmp_path / "s"],
    ):
        wheels = [] if command[0] == "wheel" else list(tmp_path.glob("*.whl"))
        subprocess.run([*pip, *command, *wheels], check=True, timeout=500)
    environment = os.environ | dict(PYTHONPATH=str(tmp_path / "s"), HF_HUB_OFFLINE="1")
    result = subprocess.run(
        [sys.executable, "-c", LOAD_ALL], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    file, *names = result.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "s") and Path(timm_iebn.__file__).parent != Path(file).parent
    assert names == [folder.name for folder in read_zoo()]
