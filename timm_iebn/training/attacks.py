"""The two noise attacks of the paper on training: they reach any batch-norm or IEBN network, which stays as it is.

The paper (arXiv 1908.04008) names both; their exact form, and every number here, is our reading of it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers import IEBN2d, IEBNAct2d, SyncBatchNorm2d, SyncBatchNormAct2d, sync_batch_norm
from ..ops.activations import followed
from ..recipe import Recipe, RecipeError
from .data import fingerprint, load_images
from .loaders import Share, make_generator


class _Noisy:
    """A norm whose normalised input xhat becomes `xhat * noise_scale + noise_offset`, in training."""

    noise_scale, noise_offset, noise_in_eval = 1.0, 0.0, False

    @property
    def has_noise(self) -> bool:
        """Whether there is noise in this mode."""
        return self.training or self.noise_in_eval

    def _with_noise(self, y: Tensor, gate: Tensor | float) -> Tensor:
        """`y` = weight * gate * xhat + bias, as it is for the xhat with noise."""
        if not self.has_noise:
            return y
        weight = 1.0 if self.weight is None else self.weight
        bias = 0.0 if self.bias is None else self.bias
        shift = weight * gate * self.noise_offset + bias * (1 - self.noise_scale)
        if isinstance(shift, Tensor):
            shift = shift[..., None, None]
        return (y * self.noise_scale + shift).to(y.dtype)


class _NoisyBatchNorm(_Noisy):
    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, H, W), in the dtype and layout of `x`."""
        is_sync = isinstance(self, SyncBatchNorm2d | SyncBatchNormAct2d)
        y = self._with_noise(sync_batch_norm(self, x) if is_sync else nn.BatchNorm2d.forward(self, x), 1.0)
        return self.act(self.drop(y)) if hasattr(self, "act") else y


class _NoisyIEBN(_Noisy):
    def normalize(self, x: Tensor, residual: Tensor | None = None, act: str = "") -> Tensor:
        """As `IEBN2d.normalize`, with noise."""
        if not self.has_noise:
            return super().normalize(x, residual, act)
        y = self._with_noise(super().normalize(x), self.gate(x))
        return followed(y, residual, act)


_NOISY = {
    norm: type(f"Noisy{norm.__name__}", (noisy, norm), {"__doc__": noisy.__doc__})
    for noisy, norms in {
        _NoisyBatchNorm: (nn.BatchNorm2d, BatchNormAct2d, SyncBatchNorm2d, SyncBatchNormAct2d),
        _NoisyIEBN: (IEBN2d, IEBNAct2d),
    }.items()
    for norm in norms
}


def add_constant_noise(model: nn.Module, scale: float, offset: float) -> nn.Module:
    """The constant noise attack: every 2-d batch norm and IEBN of `model`, in place, gives in training

        weight * gate * (xhat * scale + offset) + bias

    where its own output is weight * gate * xhat + bias (batch norm: without the gate). The gate, the statistics and the
    state dict stay what they are. Norms that are to be synchronised must be so already.

    Raises:
        ValueError: there is no such norm, or one of a class that is not known to compute batch norm or IEBN.
    """
    norms = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    odd = [f"{name} ({type(m).__name__})" for name, m in norms if type(m) not in _NOISY]
    if odd or not norms:
        raise ValueError(f"can't attack {', '.join(odd)}" if odd else "there is no batch norm or IEBN to attack")
    for _, norm in norms:
        norm.__class__ = _NOISY[type(norm)]
        norm.noise_scale, norm.noise_offset = float(scale), float(offset)
    return model


@contextmanager
def noise_in_eval(model: nn.Module) -> Iterator[None]:
    """Keeps the noise of `add_constant_noise` in evaluation too, for the time of a `with` block."""
    norms = [m for m in model.modules() if isinstance(m, _Noisy)]
    for norm in norms:
        norm.noise_in_eval = True
    try:
        yield
    finally:
        for norm in norms:
            norm.noise_in_eval = False


class Strangers:
    """The mix-dataset attack: images of another data set that join each training batch behind its own images.

    So they enter the batch statistics, while the loss is that of the batch's own images. Which ones join is a function
    of the seed, the epoch, the batch and the process.
    """

    def __init__(self, recipe: Recipe, share: Share, size: tuple[int, int, int], data_dir: str = "") -> None:
        """`size` is that of the network's input, (C, H, W), to which the images are scaled.

        Raises:
            RecipeError: the data can't be read, or `mix_images` can't be shared by the processes.
        """
        parts = recipe.grad_accumulation * share.world_size
        if recipe.mix_images % parts:
            raise RecipeError(f"mix_images: {recipe.mix_images} can't be shared by {parts} (processes x parts)")
        split = load_images(replace(recipe, data=recipe.mix_data), "train", data_dir)
        self.data, images = fingerprint(split, []), split.images
        if images.shape[1] not in (1, size[0]):
            raise RecipeError(f"mix_data: {recipe.mix_data!r} has images of {images.shape[1]} channels, not {size[0]}")
        if images.shape[2:] != size[1:]:
            images = F.interpolate(images.float(), size[1:], mode="bilinear", antialias=True).round().byte()
        self.images = images.expand(-1, size[0], -1, -1).to(share.device)
        self.recipe, self.share, self.count = recipe, share, recipe.mix_images // parts

    def join(self, images: Tensor, epoch: int, step: int) -> Tensor:
        """`images` (B, C, H, W) and as many strangers as the recipe says, normalised alike."""
        generator = make_generator(self.recipe.seed, epoch, f"strangers {step} {self.share.rank}")
        chosen = torch.randint(len(self.images), (self.count,), generator=generator).to(self.images.device)
        return torch.cat([images, self.share.normalize(self.images[chosen])])
