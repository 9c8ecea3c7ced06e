"""The table of the zoo, and the script that trains all of it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from timm_iebn.recipe import Recipe
from timm_iebn.zoo import results_table

ROOT = Path(__file__).parents[1]


def add_run(zoo, name, top1, architecture=None, **recipe):
    recipe = dict(model="resnet164_cifar", data="hfds/uoft-cs/cifar100") | recipe
    folder = zoo / name
    folder.mkdir()
    (folder / "recipe.yaml").write_text(Recipe(**recipe).to_yaml())
    (folder / "log.csv").write_text(f"epoch,test_top1\n1,99.0\n2,{top1}\n")
    (folder / "config.json").write_text(json.dumps(dict(architecture=architecture or recipe["model"])))


def cells(zoo):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in results_table(zoo).splitlines()[2:]]


def test_runs_that_differ_in_norm_and_seed_share_a_row(tmp_path):
    add_run(tmp_path, "a", 70.0)
    add_run(tmp_path, "b", 72.0, seed=1)
    add_run(tmp_path, "c", 75.0, model="resnet164_cifar_iebn")
    add_run(tmp_path, "d", 60.0, lr=0.2)
    (one, other) = cells(tmp_path)
    assert one[:6] == [
        "resnet164_cifar",
        "cifar100",
        "164",
        "71.00 ± 1.41 (2 seeds)",
        "75.00 (one seed)",
        "74.29, 77.09",
    ]
    assert other[3:5] == ["60.00 (one seed)", "-"]
    assert [f"[{n}]({n}/log.csv)" in one[6] for n in "abcd"] == [True, True, True, False]


def test_a_network_stands_on_the_side_of_its_norm(tmp_path):
    tuned = dict(pretrained=True, data="digits", architecture="resnet20_cifar_iebn")
    add_run(tmp_path, "a", 98.0, model="local-dir:somewhere", **tuned)
    add_run(tmp_path, "b", 50.0, model="resnet50", model_args=dict(norm_layer="iebn"))
    (tuned, own) = cells(tmp_path)
    assert tuned[0] == "resnet20_cifar, fine-tuned" and tuned[3:6] == ["-", "98.00 (one seed)", "-"]
    assert own[0] == "resnet50" and own[3:5] == ["-", "50.00 (one seed)"]


def test_a_copy_is_no_second_seed(tmp_path):
    add_run(tmp_path, "a", 70.0)
    add_run(tmp_path, "b", 70.0)
    with pytest.raises(ValueError, match="b is the same run as a"):
        results_table(tmp_path)


def test_the_table_in_the_zoo_is_that_of_its_folders():
    assert (ROOT / "zoo" / "README.md").read_text().endswith("\n\n" + results_table(ROOT / "zoo"))


def test_one_command_starts_or_continues_the_whole_list(tmp_path):
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | dict(PATH=python, MODELS="resnet20_cifar", SEEDS="0 1", OUTPUT=str(tmp_path), JOBS="2")
    environment |= dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [ROOT / "scripts" / "reproduce.sh", "data=digits", "data_config={}", "epochs=1"]
    command += ["milestones=[]"]
    for _ in range(2):
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert result.returncode == 0, result.stdout + result.stderr
    for model in ("resnet20_cifar", "resnet20_cifar_iebn"):
        for seed in (0, 1):
            assert (tmp_path / f"{model}.digits_1epochs_seed{seed}" / "model.safetensors").exists()
            said = (tmp_path / f"{model}-seed{seed}.log").read_text()
            assert said.count("epoch   1/1") == 1 and said.count("on the test split") == 2, said
