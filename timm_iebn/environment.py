"""What decides a result beside its recipe: the machine, and the versions of the code that ran there."""

import platform
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

from . import __version__

_PACKAGES = ("torch", "timm", "accelerate", "safetensors", "huggingface-hub")


def environment(device: torch.device) -> str:
    """The day, the machine, and the versions of what decides a result on it, a line for each."""
    if device.type == "cuda":
        machine = torch.cuda.get_device_name(device)
    else:
        machine = f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"
    about = f"# {date.today()}, Python {platform.python_version()}, {platform.system()}, {device.type}: {machine}"
    own = f"timm-iebn=={__version__}{commit_of(Path(__file__).parent)}"
    return "\n".join([about, own, *(f"{name}=={version(name)}" for name in _PACKAGES)]) + "\n"


def commit_of(folder: Path) -> str:
    """As a comment: the last commit that changed `folder`, and whether it is changed; empty if it is not in git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h")  # nothing, where it is installed in somebody else's repository
        changes = ", with changes" if commit and git("status", "--porcelain") else ""
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"  # commit {commit}{changes}" if commit else ""
