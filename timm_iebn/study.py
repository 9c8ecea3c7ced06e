"""A study: networks trained by one recipe under several conditions and seeds, compared with error bars.

A folder of zoo/studies/ holds its study.yaml, what every run of it left (recipe, log, versions; no weights), and what
is written from these: a table and curves.
"""

import json
import math
import re
import shutil
import statistics
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from itertools import chain, product
from pathlib import Path
from typing import Any

import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .checkpoint import write_atomically
from .messages import shorten
from .model_folder import read_log
from .recipe import RecipeError, load_recipe
from .results import mean_and_spread, paired_difference
from .safe_yaml import parse_yaml

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
    title: str
    text: str  # what is asked and how, in Markdown
    recipe: str  # its file, from the study's folder
    networks: dict[str, dict[str, Any]]  # overrides of the recipe by name; the others are compared with the first one
    seeds: list[int]
    rows: dict[str, dict[str, Any]]  # conditions: further overrides by name
    columns: dict[str, str]  # of the log, with what they are called
    control: str = ""  # the row, if any, from which the others are changes that each network may bear or not

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
        runs = []
        for seed, row, network in product(self.seeds, self.rows, self.networks):
            overrides = [f"{k}={json.dumps(v)}" for k, v in (self.overrides(row, network) | dict(seed=seed)).items()]
            name = re.sub(r"[^\w.]+", "_", f"{row}.{network}.seed{seed}")
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

    def log(self, run: Run) -> list[dict[str, float]] | None:
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

    def logs(self, row: str, network: str) -> dict[int, list[dict[str, float]]]:
        """The logs of the runs made of `row` and `network`, by seed."""
        found = {run.seed: self.log(run) for run in self.runs if (run.row, run.network) == (row, network)}
        return {seed: log for seed, log in found.items() if log}

    def results(self, row: str, network: str, column: str) -> dict[int, float]:
        """The last epoch's `column` of the runs made of `row` and `network`, by seed."""
        return {seed: log[-1][column] for seed, log in self.logs(row, network).items()}

    def changes(self, row: str, network: str, column: str) -> dict[int, float]:
        """How the results of `row` differ from those of the control, by seed."""
        there, here = (self.results(r, network, column) for r in (row, self.control))
        return {seed: there[seed] - here[seed] for seed in there.keys() & here.keys()}

    def places(self, column: str) -> int:
        """As many decimal places as show three digits of the column's largest result, at least two."""
        results = [self.results(row, network, column).values() for row, network in product(self.rows, self.networks)]
        largest = max(map(abs, chain(*results)), default=0.0)
        return max(2, 2 - math.floor(math.log10(largest))) if largest else 2


def load_study(folder: Path, again: Path | None = None) -> Study:
    """The study in `folder`; to be made `again` in a folder of its name there, if given.

    Raises:
        RecipeError: its study.yaml is not one, or some run to be made has no possible recipe.
        ValueError: the log of a run is damaged; the message names it.
    """
    try:
        values = parse_yaml((folder / "study.yaml").read_text(encoding="utf-8"))
        study = Study(folder=folder, **values)
        _check(study)
        if again:
            study = replace(study, folder=again / folder.resolve().name, recipe=str(study.recipe_path.resolve()))
    except (OSError, TypeError, ValueError, yaml.YAMLError) as e:
        keys = ", ".join(f.name for f in fields(Study)[1:])
        raise RecipeError(f"{folder / 'study.yaml'} is no study, which has the keys {keys}: {shorten(e)}") from e
    for run in study.runs:
        if study.log(run) is None:  # what was made needs no option that is gone since
            load_recipe(study.recipe_path, run.overrides)
    return study


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
        "seeds": ("a list of whole numbers", lambda v: isinstance(v, list) and v and all(type(s) is int for s in v)),
        "rows": (changes, lambda v: _is_mapping(v, dict)),
        "columns": ("a mapping of columns to what they are called", lambda v: _is_mapping(v, str)),
        "control": ("one of the rows", lambda v: not v or v in study.rows),
    }
    for name, (what, is_right) in wanted.items():
        if not is_right(value := getattr(study, name)):
            raise TypeError(f"{name} should be {what}, is {value!r}")
    name, count = Counter(run.name for run in study.runs).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} runs would share the folder {name}: give seeds, rows and networks other names")


def keep(study: Study, run: Run, output: Path) -> None:
    """Takes what documents `run` from the model folder `output` that it has written."""
    folder = study.folder / "runs" / run.name
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in RUN_FILES:
        shutil.copyfile(output / name, partial / name)
    if (folder / "log.csv").exists():  # another process makes this study too, and was first
        shutil.rmtree(partial)
    else:
        partial.rename(folder)


def same_run(study: Study, run: Run) -> Path | None:
    """The folder of a run by the very recipe of `run`, in a study beside this one or in the zoo that holds them."""
    recipe, studies = load_recipe(study.recipe_path, run.overrides), study.folder.resolve().parent
    zoo = [] if study.is_again else studies.parent.glob("*")
    for folder in sorted([*studies.glob("*/runs/*"), *zoo]):
        if folder.suffix == ".partial" or not all((folder / name).exists() for name in RUN_FILES):
            continue
        with suppress(ValueError):  # damaged, or with an option that is gone since
            if load_recipe(folder / "recipe.yaml") == recipe and len(read_log(folder / "log.csv")) == recipe.epochs:
                return folder
    return None


def write_report(study: Study) -> None:
    """README.md and curves.png of a study."""
    study.folder.mkdir(parents=True, exist_ok=True)  # which a study that is made again has not, before its first run
    write_atomically(study.folder / "README.md", report(study).encode())
    plot_study(study, study.folder / "curves.png")


def report(study: Study) -> str:
    """The study's README.md: what it asks, and what its logs say."""
    baseline, *_ = study.networks
    first, *_ = study.columns
    places = {column: study.places(column) for column in study.columns}  # once: each reads all logs

    def result(row: str, network: str, column: str) -> list[str]:
        """What was found, and how it differs from the baseline's."""
        ours, base = (study.results(row, n, column) for n in (network, baseline))
        return [mean_and_spread([*ours.values()], places[column]), paired_difference(ours, base, places[column])]

    def change(row: str, network: str, column: str) -> list[str]:
        """How what was found differs from the control's, and how this change differs from the baseline's."""
        there, here = (study.results(r, network, column) for r in (row, study.control))
        ours, base = (study.changes(row, n, column) for n in (network, baseline))
        return [paired_difference(*pair, places[column]) for pair in ((there, here), (ours, base))]

    tables = _table(study, [*study.rows], [*study.columns], f"against {baseline}", result)
    if study.control:
        others = [row for row in study.rows if row != study.control]
        changes = _table(study, others, [first], f"against {baseline}'s change", change)
        tables += f"\n\nWhat has changed from {study.control}, with the same norm:\n\n{changes}"
    made = sum(study.log(run) is not None for run in study.runs)
    again = f" --again {study.folder.parent}" if study.is_again else ""
    command = f"python scripts/study.py zoo/studies/{study.folder.name}{again}"
    rest = f" The rest:\n\n    {command}" if made < len(study.runs) else ""
    return f"""\
<!-- written by scripts/study.py -->
# {study.title}

{study.text.strip()}

Figures are those of the last epoch: mean and standard deviation over seeds; differences are those of runs of one seed,
with their 95 % confidence interval. {made} of {len(study.runs)} runs are made; each one's recipe, log and versions
are in `runs/`.{rest}

{tables}

![Curves](curves.png)
"""


def _table(
    study: Study, rows: list[str], columns: list[str], against: str, cells: Callable[[str, str, str], list[str]]
) -> str:
    """In Markdown: for each network in each of `rows` a line, of two `cells` for each of `columns`."""
    head = [f"{study.columns[column]} | {against}" for column in columns]
    lines = [f"| | Norm | {' | '.join(head)} |", f"|---|---|{'---|---|' * len(head)}"]
    baseline, *_ = study.networks
    for row, network in product(rows, study.networks):
        found = [cells(row, network, column) for column in columns]
        line = [f"{ours} | {'' if network == baseline else difference}" for ours, difference in found]
        lines.append(f"| {row} | {network} | {' | '.join(line)} |")
    return "\n".join(lines)


def plot_study(study: Study, path: Path) -> None:
    """The columns over the epochs, for each condition, as PNG: mean and range over seeds."""
    rows, columns = list(study.rows), study.columns
    size = (3.2 * len(rows) + 1, 2.6 * len(columns) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(columns), len(rows), squeeze=False, sharex="col", sharey="row")
    for (i, (column, label)), (j, row) in product(enumerate(columns.items()), enumerate(rows)):
        axes = grid[i][j]
        for k, network in enumerate(study.networks):
            curves = [[epoch[column] for epoch in log] for log in study.logs(row, network).values()]
            if curves:
                at, points = range(1, len(curves[0]) + 1), list(zip(*curves, strict=True))
                axes.plot(at, [statistics.mean(p) for p in points], f"C{k}.-", label=network)
                axes.fill_between(at, *([f(p) for p in points] for f in (min, max)), color=f"C{k}", alpha=0.2)
        axes.grid(alpha=0.3)
        if i == 0:
            axes.set_title(row, fontsize=9)
        if j == 0:
            axes.set_ylabel(label, fontsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    grid[-1][0].set_xlabel("epoch")
    if handles := grid[0][0].get_legend_handles_labels()[0]:
        grid[0][0].legend(handles=handles, fontsize=7)
    figure.savefig(path, dpi=110)
