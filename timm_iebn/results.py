"""What the zoo shows: each network beside its batch-norm twin, over seeds, as tables and as a plot."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, ScalarFormatter
from scipy.special import stdtrit  # not scipy.stats, whose import takes a second

from .models._registry import WARM_START
from .recipe import Recipe, load_recipe
from .zoo import Cost, speeds_of


class Norm(NamedTuple):
    """One of the norms that the zoo compares."""

    name: str
    suffix: str  # of the networks' names
    mark: str  # in plots
    color: str


BATCH_NORM = Norm("batch norm", "", "o", "tab:gray")
IEBN = Norm("IEBN", "_iebn", "s", "tab:blue")
SE = Norm("squeeze-and-excitation", "_se", "^", "tab:orange")  # behind batch norm
NEUTRAL_IEBN = Norm("IEBN, neutral gates", "_iebn", "D", "tab:cyan")
NORMS = (BATCH_NORM, IEBN, SE, NEUTRAL_IEBN)

# arXiv 1908.04008
_PAPER = {("resnet164_cifar", "cifar100"): {BATCH_NORM: 74.29, IEBN: 77.09}}


def _norm_named(architecture: str) -> Norm:
    """The norm that the name of a network says."""
    return next((norm for norm in (IEBN, SE) if architecture.endswith(norm.suffix)), BATCH_NORM)


def norm_of(recipe: Recipe, architecture: str) -> Norm:
    """The norm of the network that `recipe` has trained."""
    norm = IEBN if str(recipe.model_args.get("norm_layer")).startswith("iebn") else _norm_named(architecture)
    return NEUTRAL_IEBN if norm is IEBN and recipe.model_args.get("neutral_gates") else norm


def _places(spread: float, places: int) -> int:
    """`places`, or up to two more that show two digits of `spread`: rounded to 0, an interval would hide a sign."""
    needed = 1 - math.floor(math.log10(spread)) if 0 < spread < math.inf else 0
    return min(max(places, needed), places + 2)


def _deviation(values: Sequence[float]) -> float:
    """The standard deviation; not a number where one of `values`, as of a run that came to nothing, is not finite."""
    return statistics.stdev(values) if all(map(math.isfinite, values)) else math.nan


def mean_and_spread(values: Sequence[float], places: int = 2) -> str:
    """Mean, standard deviation and number of `values`, to so many decimal places or a few more."""
    if len(values) < 2:
        return f"{values[0]:.{places}f} (one seed)" if values else "-"
    mean, spread = statistics.fmean(values), _deviation(values)
    places = _places(spread, places)
    return f"{mean:.{places}f} ± {spread:.{places}f} ({len(values)} seeds)"


def paired_difference(ours: dict[int, float], baseline: dict[int, float], places: int = 2) -> str:
    """The mean difference of runs of one seed, and its 95 % confidence interval by Student's t, where they differ."""
    seeds = sorted(ours.keys() & baseline.keys())
    differences = [round(ours[s] - baseline[s], 12) for s in seeds]  # equal ones may differ by less
    if not seeds:
        return "-"
    mean = statistics.fmean(differences)
    if len(seeds) < 2:
        return f"{mean:+.{places}f}"
    half = stdtrit(len(seeds) - 1, 0.975) * _deviation(differences) / len(seeds) ** 0.5
    if half == 0:  # of figures that come in steps, as accuracies do: no interval says how sure that is
        return f"{mean:+.{places}f} (each)"
    places = _places(half, places)
    return f"{mean:+.{places}f} [{mean - half:+.{places}f}, {mean + half:+.{places}f}]"


class TrainedModel(NamedTuple):
    """A model folder, and its config.json."""

    folder: Path
    config: dict[str, Any]


@dataclass
class Comparison:
    """Runs that differ in norm and seed only."""

    recipe: Recipe  # of the batch-norm side, whatever its seed
    sides: dict[Norm, dict[int, TrainedModel]]  # by seed

    @property
    def name(self) -> str:
        fine_tuned, study = self.recipe.pretrained, self.recipe.is_study
        return self.recipe.model + (", fine-tuned" if fine_tuned else "") + (", for study" if study else "")

    @property
    def data(self) -> str:
        return self.recipe.data.rpartition("/")[2]

    @property
    def paper(self) -> dict[Norm, float]:
        """What the paper reports, in percent."""
        return {} if self.recipe.pretrained else _PAPER.get((self.recipe.model, self.data), {})

    def config(self, norm: Norm) -> dict[str, Any]:
        """The config.json of one of the runs with that norm."""
        return next(iter(self.sides[norm].values())).config

    def top1(self, norm: Norm) -> dict[int, float]:
        """The last epoch's top-1 by seed, in percent."""
        return {seed: model.config["training"]["test_top1"] for seed, model in self.sides.get(norm, {}).items()}

    def mean(self, norm: Norm) -> str:
        return mean_and_spread([*self.top1(norm).values()])

    def difference(self, norm: Norm) -> str:
        """From batch norm."""
        return "" if norm is BATCH_NORM else paired_difference(self.top1(norm), self.top1(BATCH_NORM))


def compare(configs: dict[Path, dict[str, Any]]) -> list[Comparison]:
    """The runs of model folders, each network beside its twin, from their config.json and recipe.yaml.

    Raises:
        ValueError: two folders hold the same run.
    """
    found: dict[str, Comparison] = {}  # by the recipe without norm and seed
    for folder, config in sorted(configs.items()):
        recipe = load_recipe(folder / "recipe.yaml")
        norm = norm_of(recipe, config["architecture"])
        model_args = {k: v for k, v in recipe.model_args.items() if k not in ("norm_layer", "neutral_gates")}
        model = config["architecture"].removesuffix(norm.suffix)
        tag = recipe.model.rstrip("/").rpartition("/")[2].partition(".")[2].removeprefix(WARM_START)
        if recipe.pretrained and tag:  # networks that start from other weights are others
            model = f"{model}.{tag}"
        common = replace(recipe, model=model, model_args=model_args, seed=0)
        comparison = found.setdefault(common.to_yaml(), Comparison(common, {}))
        runs = comparison.sides.setdefault(norm, {})
        if recipe.seed in runs:
            raise ValueError(f"{folder.name} is the same run as {runs[recipe.seed].folder.name}: remove one of them")
        runs[recipe.seed] = TrainedModel(folder, config)
    for comparison in found.values():
        comparison.sides = {norm: comparison.sides[norm] for norm in NORMS if norm in comparison.sides}
    return [*found.values()]


def count(number: int) -> str:
    """278324 as 0.2783 M."""
    return f"{number / 1e6:.4g} M" if number >= 1e5 else str(number)


def results_table(comparisons: list[Comparison], costs: list[Cost]) -> str:
    """The results as a Markdown table."""
    lines = [
        "| Network | Data | Epochs | Norm | Parameters | MACs | Images/s | Top-1, % | Difference | Paper, % | Runs |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in comparisons:
        for norm, runs in row.sides.items():
            config = row.config(norm)
            speed = ", ".join(f"{v:g} ({k})" for k, v in speeds_of(config, costs).items()) or "-"
            paper = f"{row.paper[norm]:.2f}" if norm in row.paper else "-"
            logs = " ".join(f"[seed {seed}]({model.folder.name})" for seed, model in sorted(runs.items()))
            cost = count(config["parameters"]), count(config["macs"]), speed
            result = row.mean(norm), row.difference(norm), paper
            cells = row.name, row.data, str(row.recipe.epochs), norm.name, *cost, *result, logs
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def costs_table(costs: list[Cost]) -> str:
    """What networks cost as a Markdown table, the cheap ones first; in brackets, against batch norm in its place."""
    lines = ["| Network | Images | Norm | Parameters | MACs | Images/s | Batch | Device |"]
    lines.append(f"|{'---|' * 8}")
    measured = {(cost.device, cost.batch_size, cost.input_size, cost.architecture): cost for cost in costs}

    rows = []
    for cost in costs:
        norm, where = _norm_named(cost.architecture), (cost.device, cost.batch_size, cost.input_size)
        name = cost.architecture.removesuffix(norm.suffix)
        twin = measured.get((*where, name), cost)
        rows.append(((*where, twin.macs, name, NORMS.index(norm)), name, norm, cost, twin))
    for _, name, norm, cost, twin in sorted(rows, key=lambda row: row[0]):
        sizes, speed = count(cost.parameters), f"{cost.images_per_second:g}"
        if twin is not cost:
            sizes += f" ({100 * (cost.parameters / twin.parameters - 1):+.2f} %)"
            speed += f" ({100 * (cost.images_per_second / twin.images_per_second - 1):+.0f} %)"
        cells = name, cost.input_size, norm.name, sizes, count(cost.macs), speed, str(cost.batch_size), cost.device
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def short_table(comparisons: list[Comparison]) -> str:
    """One line for each network trained from scratch with both norms: what a README has room for."""
    lines = ["| Network | Data | Epochs | Batch norm, top-1 % | IEBN, top-1 % | Difference |"]
    lines.append("|---|---|---|---|---|---|")
    for row in comparisons:
        if {BATCH_NORM, IEBN} <= row.sides.keys() and not row.recipe.pretrained:
            results = row.mean(BATCH_NORM), row.mean(IEBN), row.difference(IEBN)
            lines.append(f"| {' | '.join((row.name, row.data, str(row.recipe.epochs), *results))} |")
    return "\n".join(lines) + "\n"


def plot_results(comparisons: list[Comparison]) -> Figure:
    """Accuracy against multiply-accumulates, IEBN beside batch norm; bars are standard deviations."""
    data = sorted({row.data for row in comparisons})  # accuracies on different ones can't be compared
    figure = Figure(figsize=(6 * max(1, len(data)), 4), layout="constrained")
    for axes, name in zip(figure.subplots(1, max(1, len(data)), squeeze=False)[0], data, strict=False):
        _plot_data([row for row in comparisons if row.data == name], axes)
        axes.set_title(name)
    return figure


def _plot_data(rows: list[Comparison], axes: Axes) -> None:
    for row in rows:
        for norm in row.sides:
            top1 = [*row.top1(norm).values()]
            bar = statistics.stdev(top1) if len(top1) > 1 else None
            # side by side, or one bar would hide another
            at = row.config(norm)["macs"] / 1e6 * 1.02 ** (NORMS.index(norm) - 0.5), statistics.mean(top1)
            axes.errorbar(*at, yerr=bar, fmt=norm.mark, color=norm.color, capsize=3, label=norm.name)
        note = f"{row.name}\n{row.recipe.epochs} epochs"
        axes.annotate(note, at, xytext=(8, -14), textcoords="offset points", annotation_clip=False)
    axes.set_xscale("log")
    costs = {round(row.config(norm)["macs"] / 1e6) for row in rows for norm in row.sides}
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
