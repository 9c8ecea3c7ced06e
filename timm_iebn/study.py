"""A study: networks trained by one recipe under several conditions and seeds, compared with error bars.

A folder of zoo/studies/ holds its study.yaml, what every run of it left (recipe, log, versions; no weights), and what
`study_report` writes from these: a table and curves.
"""

import json
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import permutations, product
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from .messages import describe, shorten
from .recipe import Recipe, RecipeError, changes_between, load_recipe, parse_overrides
from .run_log import columns_of, read_log
from .safe_yaml import parse_yaml

Log = list[dict[str, float]]  # its epochs
RUN_FILES = ("recipe.yaml", "log.csv", "environment.txt")


@dataclass(frozen=True)
class Run:
    """One training run of a study."""

    name: str
    row: str
    network: str
    seed: int
    overrides: list[str]  # of the study's recipe, as scripts/train.py takes them


@dataclass(frozen=True)
class Study:
    """What a study.yaml says."""

    folder: Path
    changes: list[str]  # of the recipe, key=value, in a study that is made again
    title: str
    text: str  # what is asked and how, in Markdown
    recipe: str  # its file, from the study's folder
    networks: dict[str, dict[str, Any]]  # overrides of the recipe by name; the others are compared with the first one
    seeds: list[int]
    rows: dict[str, dict[str, Any]]  # conditions: further overrides by name
    columns: dict[str, str]  # of the log, with what they are called
    control: str = ""  # the row, if any, from which the others are changes that each network may bear or not
    pairs: list[list[str]] = field(default_factory=list)  # of networks, the first one compared with the other too

    @property
    def recipe_path(self) -> Path:
        return self.folder / self.recipe

    @property
    def is_again(self) -> bool:
        """Whether its runs are made again, in a folder apart from its study.yaml."""
        return not (self.folder / "study.yaml").exists()

    @property
    def runs(self) -> list[Run]:
        """All runs, in an order that completes comparisons early."""
        runs, changed = [], parse_overrides(self.changes).keys()
        for seed, row, network in product(self.seeds, self.rows, self.networks):
            own = self.overrides(row, network) | dict(seed=seed)
            if both := changed & own.keys():
                raise ValueError(f"{self.title!r} sets {', '.join(sorted(both))} for each run: that can't be changed")
            name = re.sub(r"[^\w.]+", "_", f"{row}.{network}.seed{seed}")
            overrides = [*self.changes, *(f"{k}={json.dumps(v)}" for k, v in own.items())]
            runs.append(Run(name, row, network, seed, overrides))
        return runs

    def overrides(self, row: str, network: str) -> dict[str, Any]:
        """What `row` and `network` change in the recipe. A model of the network's such as _iebn ends the row's.

        Raises:
            ValueError: both set a key: one would win, and the networks differ in what they have in common.
        """
        condition, own = dict(self.rows[row]), dict(self.networks[network])
        if "model" in condition and str(own.get("model")).startswith("_"):
            own["model"] = f"{condition.pop('model')}{own['model']}"
        if both := condition.keys() & own.keys():
            raise ValueError(f"row {row!r} and network {network!r} both set {', '.join(sorted(both))}")
        return condition | own

    @property
    def command(self) -> str:
        """What makes the runs that are missing."""
        again = ["--again", str(self.folder.parent)] if self.is_again else []
        changes = [word for change in self.changes for word in ("--change", change)]
        return shlex.join(["python", "scripts/study.py", f"zoo/studies/{self.folder.name}", *again, *changes])

    def log(self, run: Run) -> Log | None:
        """The epochs of `run`, if it has been made."""
        path = self.folder / "runs" / run.name / "log.csv"
        if not path.exists():
            return None
        rows = read_log(path)
        for row in rows:
            if "test_top1" in row:  # without noise there is one evaluation
                row.setdefault("test_top1_with_noise", row["test_top1"])
        if not rows or not self.columns.keys() <= rows[0].keys():
            raise ValueError(f"{path} lacks one of the study's columns, {', '.join(self.columns)}: move its run away")
        return rows


def load_study(folder: Path, again: Path | None = None, changes: Sequence[str] = ()) -> Study:
    """The study in `folder`; to be made `again` in a folder of its name there, if given, with `changes` of the recipe,
    key=value.

    Raises:
        RecipeError: its study.yaml is not one, some run to be made has no possible recipe or logs no such columns, or
            one that is made was made by another recipe, or is not whole.
        ValueError: the log of a run is damaged, and the message names it; or each run sets what `changes` do.
    """
    if changes and not again:
        raise RecipeError(f"a study is made by its own recipe: {', '.join(changes)} is possible with --again only")
    try:
        values = parse_yaml((folder / "study.yaml").read_text(encoding="utf-8"))
        study = Study(folder=folder, changes=[], **values)
        _check(study)
    except (OSError, TypeError, ValueError, yaml.YAMLError) as e:
        keys = ", ".join(f.name for f in fields(Study)[2:])
        raise RecipeError(f"{folder / 'study.yaml'} is no study, which has the keys {keys}: {shorten(e)}") from e
    if again:
        there = again / folder.resolve().name
        study = replace(study, folder=there, changes=[*changes], recipe=str(study.recipe_path.resolve()))
        if not study.is_again:
            raise RecipeError(f"{study.folder} is the folder of a study: have it made again elsewhere than in {again}")
    others: dict[str, list[str]] = {}  # runs by what their recipes changed
    for run in study.runs:
        if log := study.log(run):
            if changed := _changes(study, run, log):
                others.setdefault(changed, []).append(run.name)
            continue
        columns = columns_of(load_recipe(study.recipe_path, run.overrides))
        if missing := study.columns.keys() - columns - {"test_top1_with_noise"}:
            raise RecipeError(
                f"{folder / 'study.yaml'}: columns: {run.name} will log no {', '.join(sorted(missing))}, but "
                f"{', '.join(columns)}"
            )
    if others:
        remedy = "have the study made again elsewhere" if study.is_again else "move them away or take the change back"
        runs = "; ".join(f"{', '.join(names)} ({changed})" for changed, names in others.items())
        raise RecipeError(f"{study.folder / 'runs'} has runs by another recipe than the study's: {runs}; {remedy}")
    return study


def _changes(study: Study, run: Run, log: Log) -> str:
    """How the recipe of `run` has changed since it was made, if it has.

    Raises:
        RecipeError: it is not whole, or what is left of it is damaged.
    """
    kept = study.folder / "runs" / run.name
    try:
        said = parse_yaml((kept / "recipe.yaml").read_text(encoding="utf-8"))
        is_current = said.keys() <= {f.name for f in fields(Recipe)}
        before = asdict(Recipe(**said)) if is_current else said
        epochs = before["epochs"]
    except (OSError, ValueError, AttributeError, KeyError, TypeError, yaml.YAMLError) as e:
        raise RecipeError(f"{kept / 'recipe.yaml'} is not the recipe of a run: {describe(e)}") from e
    if len(log) != epochs:
        raise RecipeError(f"{kept / 'log.csv'} has {len(log)} of {epochs} epochs: move its run away")
    if is_current:
        return changes_between(before, asdict(load_recipe(study.recipe_path, run.overrides)))
    return changes_between(before, parse_overrides(run.overrides))  # made with an option that is gone since


def _is_mapping(value: Any, kind: type) -> bool:
    names = isinstance(value, dict) and all(isinstance(key, str) for key in value)
    return bool(value) and names and all(isinstance(v, kind) for v in value.values())


def _check(study: Study) -> None:
    """Raises TypeError or ValueError: a value is of another type, or runs can't be told apart or compared."""
    changes = "a mapping of names to changes of the recipe"
    wanted = {
        "title": ("text", lambda v: isinstance(v, str)),
        "text": ("text", lambda v: isinstance(v, str)),
        "recipe": ("text", lambda v: isinstance(v, str)),
        "networks": (changes, lambda v: _is_mapping(v, dict)),
        "seeds": (
            "a list of one or more whole numbers",
            lambda v: isinstance(v, list) and v and all(type(s) is int for s in v),
        ),
        "rows": (changes, lambda v: _is_mapping(v, dict)),
        "columns": ("a mapping of columns to what they are called", lambda v: _is_mapping(v, str)),
        "control": ("one of the rows", lambda v: not v or v in study.rows),
        "pairs": (
            "a list of pairs of networks",
            lambda v: isinstance(v, list) and all(p in map(list, permutations(study.networks, 2)) for p in v),
        ),
    }
    for name, (what, is_right) in wanted.items():
        if not is_right(value := getattr(study, name)):
            raise TypeError(f"{name} should be {what}, is {value!r}")
    name, count = Counter(run.name for run in study.runs).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} runs would share the folder {name}: give seeds, rows and networks other names")


def take_turns(study: Study) -> FileLock:
    """What those hold who write into the study's folder, who may be several processes."""
    study.folder.mkdir(parents=True, exist_ok=True)  # which a study that is made again has not, before its first run
    return FileLock(study.folder / ".lock", timeout=300)


def keep(study: Study, run: Run, output: Path) -> None:
    """Takes what documents `run` from the model folder `output` that it has written, unless it is there already."""
    folder = study.folder / "runs" / run.name
    partial = folder.with_name(folder.name + ".partial")
    with take_turns(study):
        if (folder / "log.csv").exists():
            return
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name in RUN_FILES:
                shutil.copyfile(output / name, partial / name)
            partial.rename(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def same_run(study: Study, run: Run) -> Path | None:
    """The folder of a whole run by the very recipe of `run`, in a study beside this one or the zoo that holds them."""
    recipe, studies = load_recipe(study.recipe_path, run.overrides), study.folder.resolve().parent
    zoo = [] if study.is_again else studies.parent.glob("*")
    for folder in sorted([*studies.glob("*/runs/*"), *zoo]):
        with suppress(OSError, ValueError):  # damaged, or with an option that is gone since
            if folder.suffix == ".partial" or not all((folder / name).exists() for name in RUN_FILES):
                continue
            if load_recipe(folder / "recipe.yaml") == recipe and len(read_log(folder / "log.csv")) == recipe.epochs:
                return folder
    return None
