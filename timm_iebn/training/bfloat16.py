"""bfloat16 on x86 processors that have no instructions for it: what AVX-512 computes, at the speed of float32."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from ..recipe import Recipe


class ConvolutionsInFloat32(TorchFunctionMode):
    """Within CPU autocast to bfloat16, convolves bfloat16 values in float32 and rounds the results to bfloat16.

    So do processors with AVX-512, but for the order of the sums. torch's own bfloat16 convolutions of images are, with
    AVX2, some ten times as slow as float32, and backward they round every partial sum.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not F.conv2d or not torch.is_autocast_enabled("cpu"):
            return func(*args, **kwargs)
        with torch.autocast("cpu", enabled=False):  # the rounding, as a part of the graph, rounds the gradients too
            args, kwargs = tree_map_only(Tensor, lambda t: t.bfloat16().float(), (args, kwargs))
            return func(*args, **kwargs).bfloat16()


def bfloat16_context(recipe: Recipe, device: torch.device) -> AbstractContextManager:
    """What `recipe`'s training on `device` is to run in."""
    is_slow = recipe.precision == "bf16" and device.type == "cpu" and lacks_bfloat16()
    # a compiler would leave out the rounding
    return ConvolutionsInFloat32() if is_slow and not recipe.compile else nullcontext()


def lacks_bfloat16() -> bool:
    """Whether this is an x86 processor without instructions for convolutions in bfloat16."""
    return torch.backends.cpu.get_cpu_capability() == "AVX2"
