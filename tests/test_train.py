"""The embedded default, shortened, run as a user runs it."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from timm_iebn.data import Batches, load_splits
from timm_iebn.recipe import load_recipe
from timm_iebn.train import evaluate
from timm_iebn.zoo import save_weights

TRAIN = Path(__file__).parents[1] / "scripts" / "train.py"


def run(*args, cwd, processes=1):
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = os.environ | dict(OMP_NUM_THREADS="1", ACCELERATE_USE_CPU="true")
    command = [sys.executable, *launch, str(TRAIN), *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    result = run("epochs=3", "warmup_epochs=0", cwd=folder)
    assert result.returncode == 0, result.stderr
    return next((folder / "output").iterdir()), result.stdout


def test_the_default_writes_a_complete_model_folder(trained):
    folder, output = trained
    names = {"model.safetensors", "config.json", "README.md", "recipe.yaml", "log.csv", "environment.txt"}
    assert {p.name for p in folder.iterdir()} == names
    assert load_recipe(folder / "recipe.yaml").epochs == 3
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet20_cifar_iebn" and config["label_names"] == [str(i) for i in range(10)]
    assert "epoch 3/3" in output and output.count(" is ") >= 8


def test_the_folder_loads_with_timm_and_repeats_the_logged_accuracy(trained):
    folder, output = trained
    *_, last = csv.DictReader((folder / "log.csv").read_text().splitlines())
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    cfg = model.pretrained_cfg
    assert cfg["input_size"] == (1, 32, 32) and cfg["num_classes"] == 10
    row = evaluate(model, Batches(load_splits("digits")[1], 500, cfg["mean"], cfg["std"]), Accelerator(cpu=True))
    assert f"{row['test_top1']:.2f}" == f"{float(last['test_top1']):.2f}"
    assert row["test_top1"] > 25 and f"{row['test_top1']:.2f} %" in output


def test_nothing_is_overwritten(trained):
    folder, _ = trained
    result = run("--output", str(folder), "epochs=1", cwd=folder.parent)
    assert result.returncode == 2 and str(folder) in result.stderr and "exists" in result.stderr


@pytest.mark.parametrize("override", ["model=resnet20_cifar_ibn", "modell=x", "batch_size=9999"])
def test_a_bad_recipe_ends_with_one_line_and_writes_nothing(override, tmp_path):
    result = run(override, cwd=tmp_path)
    key, value = override.split("=")
    assert result.returncode == 2 and not any(tmp_path.iterdir())
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("train.py: ") and key in last and (value in last or key == "modell")


def test_two_processes_train_to_the_weights_of_one(tmp_path):
    """Without augmentation the global batches are the same.

    Rounding alone moves a float32 gradient of ResNet-20 by some percent (batch norm's too); test_convert has the exact
    comparison, in float64.
    """
    recipe = ["epochs=1", "warmup_epochs=0", "crop_padding=0", "lr=0.01", "batch_size=700"]
    weights, losses = [], []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        result = run("--output", str(folder), *recipe, cwd=tmp_path, processes=processes)
        assert result.returncode == 0, result.stderr
        model = timm.create_model(f"local-dir:{folder}", pretrained=True)
        weights.append(torch.nn.utils.parameters_to_vector(model.parameters()))
        (row,) = csv.DictReader((folder / "log.csv").read_text().splitlines())
        losses.append(float(row["train_loss"]))
    set_seed(0)
    start = timm.create_model("resnet20_cifar_iebn", num_classes=10, in_chans=1)
    moved = (weights[0] - torch.nn.utils.parameters_to_vector(start.parameters())).norm()
    assert (weights[1] - weights[0]).norm() < 0.05 * moved
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_channels_last_weights_save_and_load(tmp_path):
    model = timm.create_model("resnet20_cifar_iebn").to(memory_format=torch.channels_last)
    save_weights(model, tmp_path / "model.safetensors")
    for name, tensor in safetensors.torch.load_file(tmp_path / "model.safetensors").items():
        assert torch.equal(tensor, model.state_dict()[name])
