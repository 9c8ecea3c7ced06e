"""IEBN written as its formula (arXiv 1908.04008, section 3), differentiated by autograd.

Every other path is tested against this one. It is also the path that TorchScript, tracing, torch.compile and export
take, because it consists of plain differentiable torch operations only. It is never optimised.
"""

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """`x` in the precision in which statistics and gates are computed: float32 for half types, else its own."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return x.float()
    return x


def iebn_reference(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(y, mean, var)`: the normalised and gated input, and the statistics that were used.

    Args:
        x: (N, C, H, W), floating point.
        weight, bias: (C,) or None for 1 and 0.
        gate_weight, gate_bias: (C,).
        mean, var: (C,) statistics to normalise with, or None for those of the batch (`var` biased).
        eps: added to the variance.

    Returns:
        y (N, C, H, W) in the dtype of `x`; mean and var (C,), float32 for half inputs, else in the dtype of `x`.
    """
    wide = widen(x)
    instance_mean = wide.mean(dim=(2, 3))
    gate = torch.sigmoid(gate_weight.to(wide.dtype) * instance_mean + gate_bias.to(wide.dtype))
    if mean is None or var is None:
        mean = instance_mean.mean(dim=0)
        centered = wide - mean[None, :, None, None]
        var = (centered * centered).mean(dim=(0, 2, 3))
    else:
        mean, var = mean.to(wide.dtype), var.to(wide.dtype)
        centered = wide - mean[None, :, None, None]
    y = centered * torch.rsqrt(var + eps)[None, :, None, None]
    scale = gate if weight is None else gate * weight.to(wide.dtype)
    y = y * scale[:, :, None, None]
    if bias is not None:
        y = y + bias.to(wide.dtype)[None, :, None, None]
    return y.to(x.dtype), mean, var
