"""What is written from the logs of a study: its README.md, a table with error bars, and its curves."""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, product
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .files import write_atomically
from .results import mean_and_spread, paired_difference
from .study import Log, Study, take_turns


@dataclass(frozen=True)
class Results:
    """The logs of a study's runs that are made, by row and network, and of these by seed."""

    study: Study
    logs: dict[tuple[str, str], dict[int, Log]]

    @property
    def made(self) -> int:
        """How many of the study's runs are made."""
        return sum(map(len, self.logs.values()))

    def last(self, row: str, network: str, column: str) -> dict[int, float]:
        """The last epoch's `column`, by seed."""
        return {seed: log[-1][column] for seed, log in self.logs[row, network].items()}

    def beside_control(self, row: str, network: str, column: str) -> dict[int, tuple[float, float]]:
        """The last epoch's `column` of `row` and of the control, by seed, where there are both."""
        there, here = (self.last(r, network, column) for r in (row, self.study.control))
        return {seed: (there[seed], here[seed]) for seed in there.keys() & here.keys()}

    def changes(self, row: str, network: str, column: str) -> dict[int, float]:
        """How `row` differs from the control, by seed."""
        return {seed: there - here for seed, (there, here) in self.beside_control(row, network, column).items()}

    def shares(self, row: str, network: str, column: str) -> dict[int, float]:
        """What `row` keeps of the control's result, in percent, by seed."""
        pairs = self.beside_control(row, network, column).items()
        return {seed: 100 * there / here for seed, (there, here) in pairs if here}

    def places(self, column: str) -> int:
        """As many decimal places as show three digits of the column's largest result, at least two."""
        values = chain(*(self.last(*place, column).values() for place in self.logs))
        largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
        return max(2, 2 - math.floor(math.log10(largest))) if largest else 2


def read_results(study: Study) -> Results:
    """Reads the logs of all runs that are made.

    Raises:
        ValueError: one of them is damaged; the message names it.
    """
    logs = {place: {} for place in product(study.rows, study.networks)}
    for run in study.runs:
        if log := study.log(run):
            logs[run.row, run.network][run.seed] = log
    return Results(study, logs)


def write_report(study: Study) -> Results:
    """Writes README.md and curves.png of a study; returns what they say."""
    with take_turns(study):
        results = read_results(study)
        write_atomically(study.folder / "README.md", report(results).encode())
        plot_study(results, study.folder / "curves.png")
    return results


def report(results: Results) -> str:
    """The study's README.md: what it asks, and what its logs say."""
    study = results.study
    baseline, *_ = study.networks
    first, *_ = study.columns
    places = {column: results.places(column) for column in study.columns}

    def result(row: str, network: str, column: str) -> list[str]:
        """What was found, and how it differs from the baseline's."""
        ours, base = (results.last(row, n, column) for n in (network, baseline))
        return [mean_and_spread([*ours.values()], places[column]), paired_difference(ours, base, places[column])]

    def change(row: str, network: str, column: str) -> list[str]:
        """How what was found differs from the control's, and how this change differs from the baseline's."""
        there, here = (results.last(r, network, column) for r in (row, study.control))
        ours, base = (results.changes(row, n, column) for n in (network, baseline))
        return [paired_difference(*pair, places[column]) for pair in ((there, here), (ours, base))]

    def share(row: str, network: str, column: str) -> list[str]:
        """What is kept of the control's result, and how this differs from what the baseline keeps."""
        ours, base = (results.shares(row, n, column) for n in (network, baseline))
        return [mean_and_spread([*ours.values()], 1), paired_difference(ours, base, 1)]

    tables = _table(study, [*study.rows], {study.columns[c]: (result, c) for c in study.columns}, "against {}")
    if study.control:
        others = [row for row in study.rows if row != study.control]
        cells = {study.columns[first]: (change, first), "kept of it, %": (share, first)}
        changes = _table(study, others, cells, "against {}'s")
        tables += f"\n\nWhat has changed from {study.control}, with the same norm:\n\n{changes}"
    if study.pairs:
        tables += f"\n\nNetworks compared with others than {baseline}:\n\n{_pairs_table(results)}"
    changed = f"\nHere the recipe is changed: {', '.join(study.changes)}.\n" if study.changes else ""
    made, asked = results.made, len(study.runs)
    rest = f" The rest:\n\n    {study.command}" if made < asked else ""
    return f"""\
<!-- written by scripts/study.py -->
# {study.title}

{study.text.strip()}
{changed}
Figures are those of the last epoch: mean and standard deviation over seeds; differences are those of runs of one seed,
with their 95 % confidence interval. {made} of {asked} runs are made; each one's recipe, log and versions
are in `runs/`.{rest}

{tables}

![Curves](curves.png)
"""


def _table(
    study: Study, rows: list[str], cells: dict[str, tuple[Callable[[str, str, str], list[str]], str]], against: str
) -> str:
    """In Markdown: for each network in each of `rows` a line, of two of `cells` for each of their titles."""
    baseline, *_ = study.networks
    head = [f"{title} | {against.format(baseline)}" for title in cells]
    lines = [f"| | Norm | {' | '.join(head)} |", f"|---|---|{'---|---|' * len(head)}"]
    for row, network in product(rows, study.networks):
        found = [make(row, network, column) for make, column in cells.values()]
        line = [f"{ours} | {'' if network == baseline else difference}" for ours, difference in found]
        lines.append(f"| {row} | {network} | {' | '.join(line)} |")
    return "\n".join(lines)


def _pairs_table(results: Results) -> str:
    """In Markdown: for each of the study's pairs in each row a line, of the differences in each column."""
    study = results.study
    lines = [f"| | Norms | {' | '.join(study.columns.values())} |", f"|---|---|{'---|' * len(study.columns)}"]
    for row, pair in product(study.rows, study.pairs):
        found = [paired_difference(*(results.last(row, n, c) for n in pair), results.places(c)) for c in study.columns]
        lines.append(f"| {row} | {' against '.join(pair)} | {' | '.join(found)} |")
    return "\n".join(lines)


def plot_study(results: Results, path: Path) -> None:
    """The columns over the epochs, for each condition, as PNG: mean and range over seeds."""
    study = results.study
    rows, columns = list(study.rows), study.columns
    size = (3.2 * len(rows) + 1, 2.6 * len(columns) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(columns), len(rows), squeeze=False, sharex="col", sharey="row")
    for (i, (column, label)), (j, row) in product(enumerate(columns.items()), enumerate(rows)):
        axes = grid[i][j]
        for k, network in enumerate(study.networks):
            curves = [[epoch[column] for epoch in log] for log in results.logs[row, network].values()]
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
