"""bfloat16 on processors with AVX2 alone, where torch's kernels for it are many times as slow as those for float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..recipe import Recipe

_aten = torch.ops.aten
_CONVOLUTIONS = (_aten.conv1d, _aten.conv2d, _aten.conv3d)
# the overload `padding` has "same" and "valid"
_OPERATORS = (_aten.linear.default, *(c.default for c in _CONVOLUTIONS), *(c.padding for c in _CONVOLUTIONS))


def has_slow_bfloat16(recipe: Recipe, device: torch.device) -> bool:
    """Whether `recipe` asks for bfloat16 on a processor with AVX2 alone."""
    is_bfloat16 = recipe.precision == "bf16" and device.type == "cpu"
    return is_bfloat16 and torch.backends.cpu.get_cpu_capability() == "AVX2"


@contextmanager
def computed_in_float32(is_wanted: bool) -> Iterator[None]:
    """If wanted: the convolutions and linear layers of autocast on CPU compute in float32, of and to rounded values.

    So do processors with AVX-512, up to float32's rounding. torch's own convolutions in bfloat16 with AVX2 also round
    partial sums of gradients. The whole process is concerned, backward passes and their checkpoints too. Not for
    compiled networks: a compiler would leave out the rounding.
    """
    library = torch.library.Library("aten", "IMPL")
    for operator in _OPERATORS if is_wanted else ():
        library.impl(operator, partial(_compute, operator), "AutocastCPU")
    try:
        yield
    finally:
        del library  # which takes its kernels with it


def _compute(
    operator: Callable[..., Tensor], x: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")

    def rounded(t: Tensor | None) -> Tensor | None:
        """What autocast would round; in the graph, so that gradients are rounded as well."""
        return t.to(dtype).float() if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    with torch.autocast("cpu", enabled=False):
        y = operator(rounded(x), rounded(weight), rounded(bias), *args, **kwargs)
        return y.to(dtype) if y.dtype == torch.float32 else y
