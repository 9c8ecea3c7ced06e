"""What is written for people: its code runs, its links lead somewhere, its numbers have a log."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import blocks

ROOT = Path(__file__).parents[1]
TEXTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("zoo/*.md"), *ROOT.glob("zoo/studies/*/*.md")]
# warm starts come from the Hub: test_pretrained_hub has them, from one on loopback; other libraries: test_downstream
CODE = [(path, code) for path in TEXTS for code in blocks(path.read_text(encoding="utf-8"), "python")]
CODE = [(p, code) for p, code in CODE if p.name != "downstream.md" and '"resnet50_iebn", pretrained=True' not in code]


@pytest.mark.parametrize(("path", "code"), CODE, ids=lambda v: v.stem if isinstance(v, Path) else "")
def test_code_runs(path, code):
    try:
        exec(compile(code, path.name, "exec"), {})
    finally:
        import timm_iebn

        timm_iebn.set_backend("auto")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_there_are(path):
    links = re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text(encoding="utf-8"))
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_reference_says_what_the_docstrings_say():
    result = subprocess.run([sys.executable, ROOT / "scripts" / "update_api.py", "--check"], capture_output=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_go_down_the_list_of_modules_in_contributing():
    table = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("| | |\n")[1].split("\n\n")[0]
    rows = [re.findall(r"`(\w+)`", row) for row in table.splitlines()[1:]]
    level = {name: number for number, row in enumerate(rows) for name in row}
    package = ROOT / "timm_iebn"
    found = {path.stem: [path] for path in package.glob("*.py") if not path.stem.startswith("__")}
    found |= {path.parent.name: [*path.parent.glob("*.py")] for path in package.glob("*/__init__.py")}
    assert found.keys() <= level.keys()
    for name, paths in found.items():
        for node in (node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
            if isinstance(node, ast.ImportFrom) and node.level == (2 if len(paths) > 1 else 1):
                for used in [node.module] if node.module else [alias.name for alias in node.names]:
                    used = used.split(".")[0]
                    assert used not in level or level[used] >= level[name], f"{name} imports {used}"


def test_every_code_of_the_documentation_was_found():
    assert {path.name for path, _ in CODE} >= {"README.md", "method.md", "warm_start.md"}


def test_scripts_that_are_named_there_are():
    for path in TEXTS:
        for name in re.findall(
            r"(?<![\w/])((?:scripts|zoo/recipes|timm_iebn|tests|docs)/[\w/.-]*\w\.\w+)", path.read_text()
        ):
            assert (ROOT / name).exists(), f"{path.name}: {name}"
