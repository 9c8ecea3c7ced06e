"""Runs the tests with the oldest or the newest versions of everything that pyproject.toml admits.

    python scripts/test_versions.py oldest|newest [arguments of pytest]

In a fresh virtual environment, which is removed at the end; its versions are printed first.
"""

import argparse
import subprocess
import sys
import tomllib
import venv
from pathlib import Path
from tempfile import TemporaryDirectory

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def lower_bounds() -> list[str]:
    """Every requirement of pyproject.toml, with its lower bound as the only version."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *project["optional-dependencies"]["train"],
        *project["optional-dependencies"]["dev"],
    ]
    bounds = [(r.name, bound) for r in map(Requirement, wanted) for bound in r.specifier]
    return [f"{name}=={bound.version}" for name, bound in bounds if bound.operator == ">="]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=("oldest", "newest"))
    args, pytest_args = parser.parse_known_args()
    with TemporaryDirectory() as folder:
        python, constraints = Path(folder) / "venv" / "bin" / "python", Path(folder) / "constraints.txt"
        venv.create(python.parents[1], with_pip=True)
        constraints.write_text("\n".join(lower_bounds()) if args.end == "oldest" else "", encoding="utf-8")
        pip = [python, "-m", "pip"]
        subprocess.run([*pip, "install", "-q", "-e", f"{ROOT}[dev]", "-c", constraints], check=True)
        subprocess.run([*pip, "freeze", "--exclude-editable"], check=True)
        # old releases meet new ones of what they need, which warn of them
        warnings = ["-W", "default"] if args.end == "oldest" else []
        return subprocess.run([python, "-m", "pytest", "-m", "", *warnings, *pytest_args], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
