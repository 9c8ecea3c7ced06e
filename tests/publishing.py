"""scripts/publish.py as a user runs it, in a process of the real Hub client and with a loopback Hub; tests share it."""

import io
import json
import runpy
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
import safetensors.torch
from hub_client import client
from hub_server import Hub

from timm_iebn.files import sha256
from timm_iebn.zoo import WEIGHTS, read_zoo

SCRIPT = str(Path(__file__).parents[1] / "scripts" / "publish.py")
FOLDER = next(folder for folder in read_zoo() if "_iebn" in folder.name)
TOKEN, READER = "hf_planted_writer", "hf_planted_reader"


class Result(NamedTuple):
    status: int
    out: str
    err: str


def run_script(*args, **env):
    """scripts/publish.py with these arguments, and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [SCRIPT, *args])
        for name, value in env.items():
            patch.setenv(name, value)
        with pytest.raises(SystemExit) as exit:
            runpy.run_path(SCRIPT, run_name="__main__")
    return Result(exit.value.code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def server():
    with Hub({TOKEN: {"lab"}, READER: set()}) as hub:
        yield hub


@pytest.fixture
def hub(server):
    """The Hub of the module, empty."""
    for everything in (server.repos, server.blobs, server.faults, server.requests):
        everything.clear()
    return server


@pytest.fixture(scope="module")
def call(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with client(home, server.url, TOKEN, TIMM_IEBN_NAMESPACE="lab", COLUMNS="200") as call:
        yield call


@pytest.fixture
def publish(call):
    """A function that runs the script on a folder, and checks that it prints no token and no traceback."""

    def run(*args, folder=FOLDER, **env):
        result = call(run_script, str(folder), *args, **env)
        assert "planted" not in result.out + result.err and "Traceback" not in result.err, result
        return result

    return run


def succeeded(result):
    assert result.status == 0, result
    return result.out


def refused(result, *reasons):
    assert result.status == 2, result
    lines = [line for line in result.err.splitlines() if line.startswith("publish.py: ")]
    assert len(lines) == 1 and all(reason in lines[0] for reason in reasons), result.err
    assert result.err.splitlines()[-1] == lines[0], result.err


def copy(tmp_path):
    folder = tmp_path / FOLDER.name
    shutil.copytree(FOLDER, folder)
    return folder


def save_weights(folder, weights):
    safetensors.torch.save_file(weights, folder / WEIGHTS)
    config = json.loads((folder / "config.json").read_text())
    config["weights_sha256"] = sha256(folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps(config))
