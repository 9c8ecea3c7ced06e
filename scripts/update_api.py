"""Writes docs/api.md, the reference of what is public, from the docstrings.

    python scripts/update_api.py [--check]

With --check nothing is written; the exit status is 1 if it is out of line.
"""

import argparse
import ast
import importlib
import inspect
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import timm_iebn

PAGE = Path(__file__).parents[1] / "docs" / "api.md"
MODULES = ("recipe", "training.trainer", "training.evaluate", "training.attacks", "training.batch_noise")
MODULES += ("gates", "zoo", "model_folder", "card", "publish")
HEAD = """\
<!-- written by scripts/update_api.py -->
# Reference

What `timm_iebn` itself holds is for everybody, and changes only as `CHANGELOG.md` says. The modules behind it are what
the scripts are made of. The networks are timm's: `timm.list_models("*_iebn")`.
"""


def signature(value: Any) -> str:
    """How a class or function is called, as its source has it: with its comments, the same on every Python."""
    lines = textwrap.dedent(inspect.getsource(value)).splitlines()
    (node,) = ast.parse("\n".join(lines)).body
    if isinstance(node, ast.FunctionDef):
        return "\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1])
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    functions = [part for part in node.body if isinstance(part, ast.FunctionDef)]
    init = next((function for function in functions if function.name == "__init__"), None)
    head = lines[node.lineno - 1]
    if fields:  # a dataclass or named tuple
        return "\n".join([head, *lines[fields[0].lineno - 1 : fields[-1].end_lineno]])
    return "\n".join([head, *lines[init.lineno - 1 : init.body[0].lineno - 1]] if init else [head])


def entry(name: str, value: Any) -> str:
    """One class or function: its signature and docstring."""
    return f"### `{name}`\n\n```py\n{signature(value)}\n```\n\n```text\n{inspect.getdoc(value)}\n```\n"


def public(module: ModuleType) -> dict[str, Any]:
    """The documented classes and functions that a module defines for others, in the order of its text."""
    names = [name for name in vars(module) if not name.startswith("_")]
    found = {name: vars(module)[name] for name in names}
    return {
        name: value
        for name, value in found.items()
        if callable(value) and getattr(value, "__module__", "") == module.__name__ and value.__doc__
    }


def page() -> str:
    """The text of docs/api.md."""
    names = [name for name in timm_iebn.__all__ if callable(getattr(timm_iebn, name))]
    parts = [HEAD, "## `timm_iebn`\n"]
    parts += [entry(f"timm_iebn.{name}", getattr(timm_iebn, name)) for name in names]
    for name in MODULES:
        module = importlib.import_module(f"timm_iebn.{name}")
        parts.append(f"## `timm_iebn.{name}`\n\n{inspect.getdoc(module)}\n")
        parts += [entry(f"timm_iebn.{name}.{key}", value) for key, value in public(module).items()]
    return "\n".join(parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    is_check, text = parser.parse_args().check, page()
    is_stale = not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text
    if is_stale and is_check:
        print("docs/api.md is out of line")
    elif is_stale:
        PAGE.write_text(text, encoding="utf-8")
    return int(is_check and is_stale)


if __name__ == "__main__":
    raise SystemExit(main())
