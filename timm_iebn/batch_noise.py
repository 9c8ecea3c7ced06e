"""Batch noise, measured: how much an image's features and gradient change with the company in its batch.

arXiv 1908.04008 names the effect and does not measure it; the measure is ours.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ANCHORS = 8


def _spread(draws: Tensor) -> float:
    """Of vectors (draws, size): the mean squared distance from their mean, as a share of the mean's square."""
    mean = draws.mean(0)
    return ((draws - mean).square().sum(1).mean() / mean.square().sum()).item()


def check_size(images: int, anchors: int, batch_size: int) -> None:
    """Raises ValueError if `batch_noise` can't work with so many."""
    if batch_size < 2 or images < anchors + batch_size - 1:
        raise ValueError(f"{anchors} anchors in batches of {batch_size} need 2 or more in each, of {images} images")


def batch_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    anchors: int = ANCHORS,
    draws: int = 8,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """The batch noise of `model` in training mode, whose state stays as it is.

    Each of the first `anchors` images is put into `draws` batches whose other images are drawn from the rest. An
    image's noise is the variance of what is found over the draws, as a share of the squared mean: of its features (what
    goes into the classifier), and of the gradient of its own loss by all weights.

    Args:
        model: a network of timm's.
        images: (N, C, H, W), as the network takes them, at least `anchors` + `batch_size` - 1 of them.
        labels: (N,).

    Returns:
        `feature_noise` and `gradient_noise`: medians over the anchors.

    Raises:
        ValueError: there are too few images.
    """
    check_size(len(images), anchors, batch_size)
    model = copy.deepcopy(model).train()  # whose running statistics may move
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    found: list[tuple[float, float]] = []
    for anchor in range(anchors):
        features, gradients = [], []
        for _ in range(draws):
            others = anchors + torch.randperm(len(images) - anchors, generator=generator)[: batch_size - 1]
            batch = images[torch.cat([torch.tensor([anchor]), others]).to(images.device)]
            feature = model.forward_head(model.forward_features(batch), pre_logits=True)
            loss = F.cross_entropy(model.get_classifier()(feature)[:1], labels[anchor, None])
            gradient = torch.autograd.grad(loss, parameters)
            features.append(feature[0].detach().double())
            gradients.append(torch.cat([g.flatten() for g in gradient]).double())
        found.append((_spread(torch.stack(features)), _spread(torch.stack(gradients))))
    feature_noise, gradient_noise = torch.tensor(found).median(0).values.tolist()
    return dict(feature_noise=feature_noise, gradient_noise=gradient_noise)
