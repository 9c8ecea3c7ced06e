"""The log of a run: log.csv, a line for each epoch, and its curves."""

import csv
import io
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .messages import shorten
from .recipe import Recipe


def columns_of(recipe: Recipe) -> list[str]:
    """The columns of the log of a run by `recipe`."""
    columns = ["epoch", "updates", "lr", "train_loss", "train_top1", "test_loss", "test_top1", "test_top5"]
    columns += ["test_top1_with_noise"] * recipe.has_noise
    columns += ["feature_noise", "gradient_noise"] * (recipe.batch_noise_images > 0)
    return [*columns, "images_per_second", "seconds"]


def log_text(rows: list[dict[str, Any]]) -> str:
    """`rows` as CSV, one line an epoch."""
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return file.getvalue()


def read_log(path: str | Path) -> list[dict[str, float]]:
    """The rows of a log.csv.

    Raises:
        ValueError: it is damaged; the message names it and the line.
    """
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file, strict=True)
        try:
            names = next(reader, [])
            if len(set(names)) < len(names):
                raise ValueError(f"a column stands twice in {names}")
            rows = []
            for values in filter(None, reader):
                if len(values) != len(names):
                    raise ValueError(f"{len(values)} values for {len(names)} columns")
                rows.append(dict(zip(names, map(float, values), strict=True)))
            return rows
        except (ValueError, csv.Error) as e:
            raise ValueError(f"{path}, line {reader.line_num}, is not of a log: {shorten(e)}") from e


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
