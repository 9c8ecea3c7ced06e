"""Evaluation: of any network known by its name, on the test split that it was made for or another one."""

from pathlib import Path

import timm
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from ..messages import describe, shorten
from ..recipe import Recipe, RecipeError, load_recipe
from .build import suggestion
from .data import open_test_data
from .loaders import Loader, make_loader, make_share


@torch.no_grad()
def evaluate(model: nn.Module, loader: Loader, accelerator: Accelerator | None = None) -> dict[str, float]:
    """Loss and top-1 and top-5 accuracy in percent over the whole split, in float32, each image counted once.

    With an `accelerator`, over the shares of all its processes.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=loader.share.device)
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # torch's default for convolutions
    try:
        for images, labels in loader.epoch():
            logits = model(images).float()
            hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            loss = F.cross_entropy(logits, labels, reduction="none").double().sum()
            sums += torch.stack([loss, hits[:, 0].sum(), hits.sum(), torch.ones_like(labels).sum()])
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    loss, top1, top5, count = (accelerator.reduce(sums) if accelerator else sums).tolist()
    return dict(test_loss=loss / count, test_top1=100 * top1 / count, test_top5=100 * top5 / count)


def open_network(
    name: str,
    accelerator: Accelerator,
    data: str | None = None,
    data_dir: str = "",
    test_split: str | None = None,
    loader: str | None = None,
    workers: int = 0,
) -> tuple[nn.Module, Loader, Recipe]:
    """The network `name` on its device, with the test batches that it can be evaluated on, and what they are.

    Args:
        name: a registered name (with or without tag), a model folder, or hf-hub:ID. A folder remembers its data.
        data, test_split, loader: as in a recipe; by default the folder's own.
        data_dir, workers: as for `train`.

    Raises:
        RecipeError: no such network or data, or its classes are others.
    """
    given = {k: v for k, v in dict(data=data, test_split=test_split, loader=loader).items() if v is not None}
    recipe = _recipe(name, given)
    test, classes = open_test_data(recipe, data_dir)
    try:
        model = timm.create_model(f"local-dir:{name}" if Path(name).is_dir() else name, pretrained=True)
        share, data_config = make_share(model, test, accelerator, recipe.channels_last)
    except Exception as e:  # whatever a config.json that anybody may have written leads to
        raise RecipeError(f"model: can't use {name!r}: {describe(e)}") from e
    if model.num_classes != len(classes):
        raise RecipeError(f"{name} tells {model.num_classes} classes apart, {recipe.data!r} has {len(classes)}")
    known = model.pretrained_cfg.get("label_names") or classes
    if not isinstance(known, list | tuple) or len(known) != len(classes):
        raise RecipeError(f"model: the label_names of {name!r} are not {len(classes)} names")
    if odd := [f"{a!r} is {b!r}" for a, b in zip(known, classes, strict=True) if a != b]:
        raise RecipeError(f"{name} knows other classes than {recipe.data!r}: {shorten(odd[0])} there")
    return model.to(accelerator.device), make_loader(test, share, data_config, workers=workers), recipe


def _recipe(name: str, given: dict[str, str]) -> Recipe:
    """The part of a recipe that evaluation knows: the folder's own, changed by what is given."""
    folder = Path(name)
    if folder.is_dir() and not (folder / "config.json").exists():
        is_run = folder.suffix == ".run"
        hint = f": an unfinished training; train.py --resume ends that of {folder.stem}" if is_run else ""
        raise RecipeError(f"model: the folder {name!r} has no config.json, so it is no model folder{hint}")
    stored = folder / "recipe.yaml"
    if stored.exists():
        before = load_recipe(stored)
        given = {k: getattr(before, k) for k in ("data", "test_split", "loader", "channels_last")} | given
    elif ":" not in name and not folder.is_dir() and not timm.is_model(name):
        raise RecipeError(f"model: {name!r} is neither a folder nor a registered name{suggestion(name)}")
    if "data" not in given:
        raise RecipeError("data: say which data with --data")
    return Recipe(model=name, **given)
