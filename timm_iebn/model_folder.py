"""Model folders: what a training run writes, `timm.create_model('local-dir:…')` loads and the Hub holds."""

import json
import shutil
from datetime import date
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from timm.models._hub import save_config_for_hf
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from .card import make_card
from .files import sha256, sync_to_disk
from .recipe import Recipe
from .run_log import log_text, plot_curves
from .zoo import WEIGHTS

FILES = (WEIGHTS, "config.json", "README.md", "recipe.yaml", "log.csv", "curves.png", "environment.txt")


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
    environments: list[str],
) -> None:
    """Writes `folder`, which must not exist, all at once: weights, config, card, recipe, log, curves, `environments`.

    They are written to `work`, a new folder of the same name on the same disk, and are on the disk before `folder` is
    there.
    """
    folder = Path(folder)
    work.mkdir(parents=True)
    try:
        _write_files(model, work, recipe, rows, classes, data_config, environments)
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
    environments: list[str],
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
    (folder / "environment.txt").write_text("\n".join(environments))
    (folder / "README.md").write_text(str(make_card(folder)), encoding="utf-8")


def _training(recipe: Recipe, row: dict[str, Any], source: str | None) -> dict[str, Any]:
    """What a reader of config.json learns of the run; recipe and log have all of it."""
    results = {k: round(row[k], 4) for k in ("test_loss", "test_top1", "test_top5")}
    what = {k: getattr(recipe, k) for k in ("data", "epochs", "seed", "pretrained")}
    where_true = dict(base_model=source, is_study=recipe.is_study)
    return what | results | dict(date=str(date.today())) | {k: v for k, v in where_true.items() if v}


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """Multiply-accumulates of convolutions and matrix products, for one image."""
    was_training, x = model.training, next(model.parameters()).new_zeros(1, *input_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    model.train(was_training)
    return counter.get_total_flops() // 2
