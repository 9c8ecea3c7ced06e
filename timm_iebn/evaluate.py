"""Evaluation; training and `scripts/validate.py` share it."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from .loaders import Loader


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
