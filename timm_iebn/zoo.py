"""Model folders: what a training run writes, `timm.create_model('local-dir:…')` loads and the Hub could hold."""

import csv
import io
import json
import platform
import shutil
import statistics
from collections import defaultdict
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.models._hub import save_config_for_hf
from torch import nn

from . import __version__
from .checkpoint import sync_to_disk
from .layers import IEBN2d
from .recipe import Recipe, load_recipe

WEIGHTS = "model.safetensors"
_PACKAGES = ("torch", "timm", "accelerate", "safetensors", "huggingface-hub")

_CARD = """\
---
library_name: timm
license: apache-2.0
tags: [image-classification, timm, timm-iebn]
---

# {model} on {data}

{norm}. Trained with timm-iebn: {epochs} epochs, seed {seed}.
Top-1 {test_top1:.2f} %, top-5 {test_top5:.2f} % on the test split, which was used for this report only; the last
epoch counts. The recipe, the log and the library versions stand beside this card.

```python
import timm
import timm_iebn  # registers the model: it must come before create_model

model = timm.create_model("local-dir:PATH_OF_THIS_FOLDER", pretrained=True).eval()
```
"""
_IEBN = (
    "Instance Enhancement Batch Normalization ([arXiv 1908.04008](https://arxiv.org/abs/1908.04008)): batch norm whose "
    "scale is gated, for each image and channel, by the channel's mean in that image"
)


def save_weights(model: nn.Module, path: str | Path) -> None:
    """The state dict of `model` as safetensors, in the default layout, whatever the layout in memory."""
    # not save_file, whose files their owner alone can read
    Path(path).write_bytes(safetensors.torch.save({k: v.contiguous() for k, v in model.state_dict().items()}))


def save_model_folder(
    model: nn.Module,
    folder: str | Path,
    work: Path,
    recipe: Recipe,
    rows: list[dict[str, Any]],
    classes: list[str],
    data_config: dict[str, Any],
) -> None:
    """Writes `folder`, which must not exist, all at once: weights, config, card, recipe, log, curves and versions.

    They are written to `work`, a new folder on the same disk, and are on the disk before `folder` is there.
    """
    folder = Path(folder)
    work.mkdir()
    try:
        _write_files(model, work, recipe, rows, classes, data_config)
        for path in (*work.iterdir(), work):
            sync_to_disk(path)
        work.rename(folder)
        sync_to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _write_files(
    model: nn.Module,
    folder: Path,
    recipe: Recipe,
    rows: list[dict[str, Any]],
    classes: list[str],
    data_config: dict[str, Any],
) -> None:
    save_weights(model, folder / WEIGHTS)
    label_names = dict(label_names=classes, pretrained_cfg=dict(tag="", crop_pct=data_config["crop_pct"]))
    save_config_for_hf(model, str(folder / "config.json"), model_config=label_names, data_config=data_config)
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "log.csv").write_text(log_text(rows))
    name = model.pretrained_cfg["architecture"] + (", fine-tuned" if recipe.pretrained else "")
    plot_curves(rows, folder / "curves.png", name)
    versions = [f"timm-iebn=={__version__}", *(f"{name}=={version(name)}" for name in _PACKAGES)]
    python = f"# Python {platform.python_version()}, {platform.system()} {platform.machine()}"
    (folder / "environment.txt").write_text("\n".join([python, *versions]) + "\n")
    norm = _IEBN if any(isinstance(m, IEBN2d) for m in model.modules()) else "Batch norm, the twin of an IEBN network"
    fields = dict(model=name, data=recipe.data, norm=norm, epochs=recipe.epochs, seed=recipe.seed)
    (folder / "README.md").write_text(_CARD.format(**fields, **{k: rows[-1][k] for k in ("test_top1", "test_top5")}))


def log_text(rows: list[dict[str, Any]]) -> str:
    """`rows` as CSV, one line an epoch."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return file.getvalue()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The rows of a log.csv."""
    with open(path, newline="") as file:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def plot_curves(rows: list[dict[str, Any]], path: str | Path, title: str) -> None:
    """Loss and accuracy over the epochs, on the training and the test split, as PNG."""
    epochs = [row["epoch"] for row in rows]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    figure.suptitle(title)
    for axes, quantity, label in zip(figure.subplots(1, 2), ("loss", "top1"), ("loss", "top-1, %"), strict=True):
        for split in ("train", "test"):
            axes.plot(
                epochs, [row[f"{split}_{quantity}"] for row in rows], ".-" if len(rows) < 20 else "-", label=split
            )
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)


def results_table(zoo: Path) -> str:
    """The results of all model folders in `zoo` as a Markdown table, each network beside its batch-norm twin.

    A row holds runs that differ in norm and seed only: mean and standard deviation of the last epoch's top-1.

    Raises:
        ValueError: two folders hold the same run.
    """
    rows = defaultdict(lambda: ({}, {}))  # of a recipe: name and top-1 of each seed, with batch norm and with IEBN
    for path in sorted(zoo.glob("*/recipe.yaml")):
        recipe, folder = load_recipe(path), path.parent
        model = json.loads((folder / "config.json").read_text())["architecture"]
        model_args = {k: v for k, v in recipe.model_args.items() if k != "norm_layer"}
        is_iebn = model.endswith("_iebn") or str(recipe.model_args.get("norm_layer")).startswith("iebn")
        key = replace(recipe, model=model.removesuffix("_iebn"), model_args=model_args, seed=0).to_yaml()
        runs = rows[key][is_iebn]
        if recipe.seed in runs:
            raise ValueError(f"{folder.name} is the same run as {runs[recipe.seed][0]}: remove one of them")
        runs[recipe.seed] = folder.name, read_log(folder / "log.csv")[-1]["test_top1"]
    lines = [
        "| Network | Data | Epochs | Batch norm | IEBN | Paper: batch norm, IEBN | Runs |",
        "|---|---|---|---|---|---|---|",
    ]
    for key, sides in rows.items():
        recipe = Recipe(**yaml.safe_load(key))
        data = recipe.data.rpartition("/")[2]
        paper = "-" if recipe.pretrained else ", ".join(_PAPER.get((recipe.model, data), ("-", "-")))
        logs = [f"[{name}]({name}/log.csv)" for runs in sides for name, _ in runs.values()]
        name = f"{recipe.model}, fine-tuned" if recipe.pretrained else recipe.model
        results = (_mean([top1 for _, top1 in runs.values()]) for runs in sides)
        lines.append(f"| {' | '.join((name, data, str(recipe.epochs), *results, paper))} | {' '.join(logs)} |")
    return "\n".join(lines) + "\n"


# arXiv 1908.04008: batch norm, IEBN
_PAPER = {("resnet164_cifar", "cifar100"): ("74.29", "77.09")}


def _mean(top1: list[float]) -> str:
    if len(top1) < 2:
        return f"{top1[0]:.2f} (one seed)" if top1 else "-"
    return f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} ({len(top1)} seeds)"
