"""Model folders: what a training run writes, `timm.create_model('local-dir:…')` loads and the Hub holds."""

import csv
import io
import json
import platform
import shutil
import subprocess
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from . import __version__
from .card import make_card
from .files import sha256, sync_to_disk
from .messages import shorten
from .recipe import Recipe
from .zoo import WEIGHTS

FILES = (WEIGHTS, "config.json", "README.md", "recipe.yaml", "log.csv", "curves.png", "environment.txt")
_PACKAGES = ("torch", "timm", "accelerate", "safetensors", "huggingface-hub")


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

    They are written to `work`, a new folder of the same name on the same disk, and are on the disk before `folder` is
    there.
    """
    folder = Path(folder)
    work.mkdir(parents=True)
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
    # of the checkpoint that the network started from, if any; null values are left out
    source = model.pretrained_cfg if recipe.pretrained else dict(license="apache-2.0")
    model.pretrained_cfg = model.pretrained_cfg | dict(label_names=None, license=source.get("license"))
    config = dict(
        label_names=classes,
        weights_sha256=sha256(folder / WEIGHTS),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, data_config["input_size"]),
        training=_training(recipe, rows[-1], source.get("hf_hub_id")),
        pretrained_cfg=dict(tag="", crop_pct=data_config["crop_pct"]),
    )
    path = folder / "config.json"
    save_config_for_hf(model, str(path), model_config=config, data_config=data_config)
    config = json.loads(path.read_text(encoding="utf-8"))
    del config["model_args"]["num_classes"]  # it stands beside them too, and transformers would pass it twice
    path.write_text(json.dumps(config, indent=2), encoding="utf-8")
    (folder / "recipe.yaml").write_text(recipe.to_yaml())
    (folder / "log.csv").write_text(log_text(rows))
    name = model.pretrained_cfg["architecture"] + (", fine-tuned" if recipe.pretrained else "")
    plot_curves(rows, folder / "curves.png", name)
    (folder / "environment.txt").write_text(environment(next(model.parameters()).device))
    (folder / "README.md").write_text(str(make_card(folder)), encoding="utf-8")


def environment(device: torch.device) -> str:
    """The day, the machine, and the versions of what decides a result on it, a line for each."""
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    about = f"# {date.today()}, Python {platform.python_version()}, {platform.system()}, {device.type}: {machine}"
    own = f"timm-iebn=={__version__}{commit_of(Path(__file__).parent)}"
    return "\n".join([about, own, *(f"{name}=={version(name)}" for name in _PACKAGES)]) + "\n"


def commit_of(folder: Path) -> str:
    """As a comment: the last commit that changed `folder`, and whether it is changed; empty if it is not in git."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", folder, *arguments, "--", "."]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        commit = git("log", "-1", "--format=%h")  # nothing, where it is installed in somebody else's repository
        changes = ", with changes" if commit and git("status", "--porcelain") else ""
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"  # commit {commit}{changes}" if commit else ""


def _training(recipe: Recipe, row: dict[str, Any], source: str | None) -> dict[str, Any]:
    """What a reader of config.json learns of the run; recipe and log have all of it."""
    results = {k: round(row[k], 4) for k in ("test_loss", "test_top1", "test_top5")}
    what = {k: getattr(recipe, k) for k in ("data", "epochs", "seed", "pretrained")}
    return what | results | dict(date=str(date.today())) | (dict(base_model=source) if source else {})


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and matrix products, for one image."""
    was_training, x = model.training, next(model.parameters()).new_zeros(1, *input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    model.train(was_training)
    return counter.get_total_flops() // 2


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
