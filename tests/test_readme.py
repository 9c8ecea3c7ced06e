"""The README's blocks load, fine-tune, train and publish, as they stand and one after the other, as in a clone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
from conftest import randomize
from hub_client import SETTINGS
from hub_server import Hub
from hub_storage import Repo
from safetensors.torch import save
from training import hub_split

ROOT = Path(__file__).parents[1]
SECTION = "## Load, fine-tune, train, publish\n"
TOKEN = "hf_planted_reader_of_readmes"


def code():
    """The language and text of each block of that section."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").partition(SECTION)[2].partition("\n## ")[0]
    parts = section.split("```")[1::2]
    return [part.split("\n", 1) for part in parts]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """What a clone holds that the blocks use."""
    root = tmp_path_factory.mktemp("clone")
    for name in ("timm_iebn", "zoo", "scripts"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copyfile(ROOT / "README.md", root / "README.md")
    return root


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: {"YOU"}}) as hub:
        weights = save(randomize(timm.create_model("resnet50")).state_dict())
        hub.repos["timm/resnet50.a1_in1k"] = Repo({"model.safetensors": weights})
        yield hub


@pytest.fixture(scope="module")
def environment(clone, hub, tmp_path_factory):
    """Little data in the form of CIFAR-100, of smaller images, a Hub on loopback, and nothing of the user's."""
    data = tmp_path_factory.mktemp("data")
    for split, count in (("train", 128), ("test", 10)):
        pixels = np.random.default_rng().integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        hub_split(data, split, pixels, [i % 100 for i in range(count)], [str(i) for i in range(100)])
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cleared = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING", "TIMM_IEBN"))}
    settings = dict(HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path_factory.mktemp("home")), HF_TOKEN=TOKEN)
    settings |= dict(PATH=path, PYTHONPATH=str(clone), DATA_DIR=str(data), OMP_NUM_THREADS="1")
    return cleared | SETTINGS | settings | dict(ACCELERATE_USE_CPU="true")


def test_every_block_does_what_the_readme_says(clone, hub, environment):
    found = code()
    assert [language for language, _ in found] == ["python", "bash", "bash", "bash"]
    for language, text in found:
        command = [sys.executable, "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
        result = subprocess.run(command, cwd=clone, env=environment, capture_output=True, text=True, timeout=900)
        assert result.returncode == 0, text + result.stdout + result.stderr
        assert TOKEN not in result.stdout + result.stderr
    tuned = timm.create_model(f"local-dir:{clone}/output/resnet20_cifar_iebn.digits_5epochs_seed0", pretrained=True)
    assert tuned.num_classes == 10
    for name in ("resnet20_cifar", "resnet20_cifar_iebn"):
        folder = clone / "zoo" / f"{name}.cifar100_60epochs_seed3"
        repo = hub.repos[f"YOU/{folder.name}"]
        assert repo.tags == dict(v1=repo.commit)
        assert repo.files["model.safetensors"] == (folder / "model.safetensors").read_bytes()
        assert f'"hf-hub:YOU/{folder.name}"' in repo.files["README.md"].decode()
    lines = (clone / "README.md").read_text(encoding="utf-8").splitlines()
    rows = [line for line in lines if line.startswith("| resnet20_cifar | cifar100 | 60 |")]
    assert len(rows) == 1 and rows[0].count("(4 seeds)") == 2
