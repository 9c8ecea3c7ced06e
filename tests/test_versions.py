"""Versions of other packages that this one does not work with are refused, by name."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from training import ENVIRONMENT

from timm_iebn.versions import check_versions

ROOT = Path(__file__).parents[1]


def with_version(monkeypatch, name, version):
    real = metadata.version
    monkeypatch.setattr(metadata, "version", lambda n: version if n == name else real(n))


def test_what_is_installed_here_is_taken():
    check_versions()
    check_versions("train")


@pytest.mark.parametrize("version", ["2.7.1", "3.0.0", "2.7.1+cu126"])
def test_an_old_or_new_torch_is_refused(version, monkeypatch):
    with_version(monkeypatch, "torch", version)
    with pytest.raises(ImportError) as error:
        check_versions()
    said = str(error.value)
    assert "needs torch<3,>=2.8" in said and f"finds {version}: pip install 'torch<3,>=2.8'" in said


@pytest.mark.parametrize("version", ["2.8.0", "2.99", "2.8.0a0+nv25.06", "2.12.0.dev20260101+cpu"])
def test_builds_of_torch_that_are_between_are_taken(version, monkeypatch):
    with_version(monkeypatch, "torch", version)
    check_versions()


def test_what_training_needs_is_looked_at_for_training_only(monkeypatch):
    with_version(monkeypatch, "accelerate", "1.9.0")
    check_versions()
    with pytest.raises(ImportError, match="accelerate.*1.9.0"):
        check_versions("train")


@pytest.mark.parametrize("name", ["torch", "timm", "huggingface_hub", "accelerate"])
def test_the_readme_names_the_range(name):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    oldest, major = re.search(rf"{name} ([\d.]+) to (\d+)\.x", readme).groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["train"]]
    wanted = [Requirement(line) for line in lines]
    (specifier,) = [r.specifier for r in wanted if r.name.replace("-", "_") == name]
    assert specifier == SpecifierSet(f">={oldest},<{int(major) + 1}")


def test_what_is_missing_is_for_those_to_say_who_need_it(monkeypatch):
    real = metadata.version

    def version(name):
        if name == "tensorboard":
            raise metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(metadata, "version", version)
    check_versions("train")


def test_importing_looks_before_anything_else_is_imported():
    code = """
import importlib.metadata as m
real = m.version
m.version = lambda name: "1.0.3" if name == "timm" else real(name)
import timm_iebn"""
    result = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True)
    assert result.returncode == 1 and "ImportError: timm-iebn needs timm<2,>=1.0.31, and finds 1.0.3" in result.stderr
