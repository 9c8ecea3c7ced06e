"""What the zoo shows: each network beside its batch-norm twin, over seeds, as tables and as a plot."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from scipy.stats import t

from .recipe import Recipe, load_recipe
from .safe_yaml import parse_yaml
from .zoo import model_folders, read_config, speeds_of


class Norm(NamedTuple):
    """One of the norms that the zoo compares."""

    name: str
    suffix: str  # of the networks' names
    mark: str  # in plots
    color: str

    @property
    def is_iebn(self) -> bool:
        return self.suffix == "_iebn"


NORMS = (
    Norm("batch norm", "", "o", "tab:gray"),
    Norm("IEBN", "_iebn", "s", "tab:blue"),
    Norm("squeeze-and-excitation", "_se", "^", "tab:orange"),  # behind batch norm
    Norm("IEBN, neutral gates", "_iebn", "D", "tab:cyan"),
)

# arXiv 1908.04008: batch norm, IEBN
_PAPER = {("resnet164_cifar", "cifar100"): (74.29, 77.09)}

Sides = tuple[dict[int, Path], ...]  # model folders by seed, for each of `NORMS`


def mean_and_spread(values: Sequence[float], places: int = 2) -> str:
    """Mean, standard deviation and number of `values`, to so many decimal places."""
    if len(values) < 2:
        return f"{values[0]:.{places}f} (one seed)" if values else "-"
    return f"{statistics.mean(values):.{places}f} ± {statistics.stdev(values):.{places}f} ({len(values)} seeds)"


def paired_difference(ours: dict[int, float], baseline: dict[int, float], places: int = 2) -> str:
    """The mean difference of runs of one seed, and its 95 % confidence interval by Student's t."""
    seeds = sorted(ours.keys() & baseline.keys())
    differences = [ours[s] - baseline[s] for s in seeds]
    if not seeds:
        return "-"
    mean = statistics.mean(differences)
    if len(seeds) < 2:
        return f"{mean:+.{places}f}"
    half = t.ppf(0.975, len(seeds) - 1) * statistics.stdev(differences) / len(seeds) ** 0.5
    return f"{mean:+.{places}f} [{mean - half:+.{places}f}, {mean + half:+.{places}f}]"


@dataclass
class Comparison:
    """Runs that differ in norm and seed only."""

    recipe: Recipe  # of the batch-norm side, whatever its seed
    sides: Sides

    @property
    def name(self) -> str:
        return self.recipe.model + (", fine-tuned" if self.recipe.pretrained else "")

    @property
    def data(self) -> str:
        return self.recipe.data.rpartition("/")[2]

    @property
    def paper(self) -> tuple[float | None, ...]:
        """What the paper reports for each side, in percent."""
        found = () if self.recipe.pretrained else _PAPER.get((self.recipe.model, self.data), ())
        return found + (None,) * (len(NORMS) - len(found))

    def config(self, side: int) -> dict[str, Any]:
        """The config.json of a run of that side."""
        return read_config(next(iter(self.sides[side].values())))

    def top1(self, side: int) -> dict[int, float]:
        """The last epoch's top-1 by seed, in percent."""
        return {seed: read_config(folder)["training"]["test_top1"] for seed, folder in self.sides[side].items()}

    def mean(self, side: int) -> str:
        return mean_and_spread([*self.top1(side).values()])

    def difference(self, side: int) -> str:
        """From batch norm."""
        return paired_difference(self.top1(side), self.top1(0)) if side else ""


def compare(folders: Iterable[Path]) -> list[Comparison]:
    """The runs of model folders, each network beside its twin.

    Raises:
        ValueError: two folders hold the same run.
    """
    rows: dict[str, Sides] = defaultdict(lambda: tuple({} for _ in NORMS))  # by the recipe without norm and seed
    for folder in folders:
        recipe, model = load_recipe(folder / "recipe.yaml"), read_config(folder)["architecture"]
        model_args = {k: v for k, v in recipe.model_args.items() if k not in ("norm_layer", "neutral_gates")}
        side = next((i for i, norm in enumerate(NORMS) if i and model.endswith(norm.suffix)), 0)
        if str(recipe.model_args.get("norm_layer")).startswith("iebn"):
            side = 1
        if side == 1 and recipe.model_args.get("neutral_gates"):
            side = 3
        key = replace(recipe, model=model.removesuffix(NORMS[side].suffix), model_args=model_args, seed=0).to_yaml()
        runs = rows[key][side]
        if recipe.seed in runs:
            raise ValueError(f"{folder.name} is the same run as {runs[recipe.seed].name}: remove one of them")
        runs[recipe.seed] = folder
    return [Comparison(Recipe(**parse_yaml(key)), sides) for key, sides in rows.items()]


def _comparisons(zoo: Path) -> list[Comparison]:
    return compare(sorted(model_folders(zoo)))


def count(number: int) -> str:
    """278324 as 0.2783 M."""
    return f"{number / 1e6:.4g} M" if number >= 1e5 else str(number)


def results_table(zoo: Path) -> str:
    """The results of all model folders in `zoo` as a Markdown table."""
    lines = [
        "| Network | Data | Epochs | Norm | Parameters | MACs | Images/s | Top-1, % | Difference | Paper, % | Runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _comparisons(zoo):
        for side, norm in enumerate(NORMS):
            if not row.sides[side]:
                continue
            config = row.config(side)
            speed = ", ".join(f"{v:.0f} ({k})" for k, v in speeds_of(config, zoo).items()) or "-"
            paper = f"{row.paper[side]:.2f}" if row.paper[side] else "-"
            logs = " ".join(f"[seed {seed}]({path.name})" for seed, path in sorted(row.sides[side].items()))
            cost = count(config["parameters"]), count(config["macs"]), speed
            result = row.mean(side), row.difference(side), paper
            cells = row.name, row.data, str(row.recipe.epochs), norm.name, *cost, *result, logs
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short_table(zoo: Path) -> str:
    """One line for each network trained from scratch with both norms: what a README has room for."""
    lines = ["| Network | Data | Epochs | Batch norm, top-1 % | IEBN, top-1 % | Difference |"]
    lines.append("|---|---|---|---|---|---|")
    for row in _comparisons(zoo):
        if all(row.sides[:2]) and not row.recipe.pretrained:
            cells = row.name, row.data, str(row.recipe.epochs), row.mean(0), row.mean(1), row.difference(1)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot_results(zoo: Path, path: Path) -> None:
    """Accuracy against multiply-accumulates, IEBN beside batch norm, as PNG; bars are standard deviations."""
    rows = _comparisons(zoo)
    data = sorted({row.data for row in rows})  # accuracies on different ones can't be compared
    figure = Figure(figsize=(6 * max(1, len(data)), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(1, len(data)), squeeze=False)[0], data, strict=False):
        _plot_data([row for row in rows if row.data == name], axes)
        axes.set_title(name)
    figure.savefig(path, dpi=120)


def _plot_data(rows: list[Comparison], axes: Axes) -> None:
    for row in rows:
        for side, norm in enumerate(NORMS):
            if top1 := [*row.top1(side).values()]:
                bar = statistics.stdev(top1) if len(top1) > 1 else None
                # side by side, or one bar would hide another
                at = row.config(side)["macs"] / 1e6 * 1.02 ** (side - 0.5), statistics.mean(top1)
                axes.errorbar(*at, yerr=bar, fmt=norm.mark, color=norm.color, capsize=3, label=norm.name)
        note = f"{row.name}\n{row.recipe.epochs} epochs"
        axes.annotate(note, at, xytext=(8, -14), textcoords="offset points", annotation_clip=False)
    axes.set_xscale("log")
    costs = {round(row.config(i)["macs"] / 1e6) for row in rows for i in range(len(NORMS)) if row.sides[i]}
    if costs:
        axes.set_xlim(min(costs) / 1.4, max(costs) * 1.4)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(sorted(costs))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set_xlabel("million multiply-accumulates for one image")
    axes.set_ylabel("top-1 on the test split, %")
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    axes.legend(unique.values(), unique.keys())
