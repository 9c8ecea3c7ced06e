"""Evaluation, and the loaders and preprocessing that suit a network; training and `scripts/validate.py` share them."""

from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from timm.data import resolve_data_config
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from .data import Images, Loader, MemoryLoader, Share, TimmLoader
from .recipe import Recipe, RecipeError


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


def make_loader(
    split: Images | Dataset, share: Share, data_config: dict[str, Any], recipe: Recipe | None = None, workers: int = 0
) -> Loader:
    """The loader for a split of `open_data`; with a `recipe` for training, without for testing."""
    if isinstance(split, Images):
        return MemoryLoader(split, share, recipe)
    return TimmLoader(split, share, data_config, recipe, workers)


def make_share(
    model: nn.Module,
    split: Images | Dataset,
    accelerator: Accelerator | None = None,
    channels_last: bool = True,
    data_config: dict[str, Any] | None = None,
) -> tuple[Share, dict[str, Any]]:
    """This process's share of the data, and the preprocessing for `split`: that of timm's config of `model`, changed by
    `data_config`.

    Raises:
        RecipeError: `data_config` asks for what `split` or `model` can't do.
    """
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in (data_config or {}).items()}
    config = resolve_data_config(model=model) | given
    channels = 3
    if isinstance(split, Images):
        own = tuple(split.images.shape[1:])
        if given.get("input_size", own) != own:
            raise RecipeError(f"data_config: in memory, images keep their size {list(own)}: use loader: timm")
        channels, config["input_size"], config["crop_pct"] = own[0], own, 1.0
        if channels != len(config["mean"]) and not given.keys() & {"mean", "std"}:
            config |= {k: (sum(config[k]) / len(config[k]),) * channels for k in ("mean", "std")}
    for key, found in dict(
        input_size=config["input_size"][0], mean=len(config["mean"]), std=len(config["std"])
    ).items():
        if found != channels:
            raise RecipeError(f"data_config: {key} {list(config[key])} is not for images of {channels} channels")
    share = Share(tuple(config["mean"]), tuple(config["std"]), channels_last=channels_last)
    if accelerator:
        place = accelerator.process_index, accelerator.num_processes, accelerator.device
        share = replace(share, **dict(zip(("rank", "world_size", "device"), place, strict=True)))
    return share, config
