"""Batch noise, measured: how much an image's features and gradient change with the company in its batch.

arXiv 1908.04008 names the effect and does not measure it; the measure is ours.
"""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ANCHORS = 32


def check_size(images: int, anchors: int, batch_size: int) -> None:
    """Raises ValueError if `batch_noise` can't work with so many."""
    if batch_size < 2 or images < anchors + batch_size - 1:
        raise ValueError(f"{anchors} anchors in batches of {batch_size} need 2 or more in each, of {images} images")


def batch_noise(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    anchors: int = ANCHORS,
    batch_size: int = 128,
    seed: int = 0,
) -> dict[str, float]:
    """The batch noise of `model` in training mode, whose state stays as it is.

    Each of the first `anchors` images, an anchor, is put into two batches whose other images are drawn from the rest,
    with replacement. Noise is the variance over such batches of the anchor's features (what goes into the classifier)
    and of the gradient of its own loss by all trained weights, as a share of the squared mean: both summed over the
    anchors. Half the squared distance of two draws estimates the variance, and their inner product the squared mean,
    without bias by how few they are; so noise of any size, and of batches of any size, can be compared.

    Args:
        model: a network of timm's.
        images: (N, C, H, W), as the network takes them, at least `anchors` + `batch_size` - 1 of them.
        labels: (N,).

    Returns:
        `feature_noise` and `gradient_noise`.

    Raises:
        ValueError: there are too few images.
    """
    check_size(len(images), anchors, batch_size)
    model = copy.deepcopy(model).train()  # whose running statistics may move
    parameters = [p for p in model.parameters() if p.requires_grad]
    generator = torch.Generator().manual_seed(seed)

    def draw(anchor: int) -> tuple[Tensor, Tensor]:
        """The features of an anchor, and its gradient, in new company."""
        others = torch.randint(anchors, len(images), (batch_size - 1,), generator=generator)
        batch = images[torch.cat([torch.tensor([anchor]), others]).to(images.device)]
        feature = model.forward_head(model.forward_features(batch), pre_logits=True)
        loss = F.cross_entropy(model.get_classifier()(feature)[:1], labels[anchor, None])
        gradient = torch.autograd.grad(loss, parameters)
        return feature[0].detach().double(), torch.cat([g.flatten() for g in gradient]).double()

    sums = torch.zeros(2, 2, dtype=torch.float64)  # of features and gradient: variance, squared mean
    for anchor in range(anchors):
        for found, first, second in zip(sums, draw(anchor), draw(anchor), strict=True):
            found += torch.stack([(first - second).square().sum() / 2, first.dot(second)]).cpu()
    feature_noise, gradient_noise = (sums[:, 0] / sums[:, 1]).tolist()
    return dict(feature_noise=feature_noise, gradient_noise=gradient_noise)
