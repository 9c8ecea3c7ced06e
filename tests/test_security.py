"""What SECURITY.md says: nothing that is loaded runs code or leaves its folder, and no token is written anywhere."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
from hub_client import SETTINGS
from training import ENVIRONMENT, SHORT, run

from timm_iebn.zoo import ZOO

ROOT = Path(__file__).parents[1]
FOLDER = ZOO / "resnet20_cifar_iebn.cifar100_60epochs_seed0"
TOKEN = "hf_planted_in_the_environment"


class Bomb:
    """What a pickle can do."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def folder(tmp_path):
    """A function that makes a model folder whose config.json has other values."""

    def make(**changes):
        shutil.copytree(FOLDER, tmp_path / "folder")
        config = json.loads((FOLDER / "config.json").read_text())
        del config["weights_sha256"]
        config["pretrained_cfg"] |= changes
        (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
        return tmp_path / "folder"

    return make


def test_torch_loads_weights_only():
    """Ruff's rules, which `.ci/run` applies, refuse all else that could run what it reads."""
    for path in (*ROOT.glob("timm_iebn/**/*.py"), *ROOT.glob("scripts/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in map(ast.unparse, node.keywords), path


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_a_pickle_in_a_model_folder_is_not_run(name, folder, tmp_path):
    place = folder()
    (place / "model.safetensors").unlink()
    torch.save(dict(a=Bomb(tmp_path / "exploded")), place / name)
    with pytest.raises((RuntimeError, OSError), match="folder"):
        timm.create_model(f"local-dir:{place}", pretrained=True)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "changes",
    [
        dict(file="{root}/other.safetensors"),
        dict(file="../other.safetensors"),
        dict(hf_hub_filename="../other.safetensors"),
        dict(hf_hub_id="evil/network"),
        dict(url="file://{root}/other.safetensors"),
        dict(custom_load=True, num_classes=10**11, input_size=[3, 10**7, 10**7]),
    ],
    ids=lambda changes: " ".join(changes),
)
def test_a_model_folder_leads_nowhere_else(changes, folder, tmp_path):
    other = timm.create_model("resnet20_cifar_iebn").state_dict()
    safetensors.torch.save_file(other, tmp_path / "other.safetensors")
    place = folder(**{k: v.format(root=tmp_path) if isinstance(v, str) else v for k, v in changes.items()})
    loaded = timm.create_model(f"local-dir:{place}", pretrained=True).state_dict()
    expected = safetensors.torch.load_file(FOLDER / "model.safetensors")
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[k], t) for k, t in expected.items())


def test_a_header_that_promises_much_takes_no_memory(folder):
    """The size of a tensor is compared with that of the file before it is allocated."""
    place = folder()
    header = json.dumps({"conv1.weight": dict(dtype="F32", shape=[2**40], data_offsets=[0, 2**42])}).encode()
    (place / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    code = f"""
import resource, timm, timm_iebn
limit = 6 * 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
try:
    timm.create_model("local-dir:{place}", pretrained=True)
except RuntimeError as e:
    print("refused:", e)"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert "refused:" in result.stdout and str(place) in result.stdout, result.stderr
    assert re.search("incomplete metadata|MetadataIncomplete", result.stdout), result.stdout  # as its version says it


def test_a_token_is_written_nowhere(tmp_path):
    """Not by training and its trackers, nor by an error of the Hub, which here does not answer."""
    settings = SETTINGS | dict(HF_TOKEN=TOKEN, HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "home"))
    environment = ENVIRONMENT | settings
    folder = tmp_path / "out"
    args = ["--output", folder, "--track", "tensorboard", *SHORT, "epochs=1"]
    trained = run(*args, cwd=tmp_path, env=environment)
    assert trained.returncode == 0, trained.stderr
    refused = {
        "publish.py": [folder, "--namespace", "lab"],
        "validate.py": ["hf-hub:lab/none", "--data", "digits"],
        "train.py": ["--output", tmp_path / "a", *SHORT, "data=hfds/lab/none"],
    }
    with ThreadPoolExecutor() as pool:  # the client waits between its tries
        tries = [pool.submit(run, *args, cwd=tmp_path, env=environment, script=s) for s, args in refused.items()]
    results = [done.result() for done in tries]
    assert [result.returncode for result in results] == [2, 2, 2], results
    for result in (trained, *results):
        assert TOKEN not in result.stdout + result.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 7 and not [path for path in written if TOKEN.encode() in path.read_bytes()]


def test_the_packages_import_opens_no_connection():
    code = """
import socket
def refuse(*_):
    raise AssertionError("a connection")
socket.socket.connect = socket.getaddrinfo = refuse
import timm_iebn, timm
timm.create_model("resnet20_cifar_iebn", pretrained=True)
timm_iebn.list_zoo()"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
