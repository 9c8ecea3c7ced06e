"""The four passes of IEBN in plain torch operations: any device, dtype and layout. `cpu` has the same in C++.

`statistics` and `normalize` make the forward pass, `reduce` and `grad_input` the backward pass; what lies between them
is exchanged between processes in synchronised training. Names carry shapes: `gate_NC` is (N, C), the other vectors are
(C,). `x`, `g` and their like are (N, C, H, W); everything else has the `wide_dtype` of `x`, parameters any.
"""

import torch
from torch import Tensor

from .reference import wide_dtype


def _plane(v: Tensor) -> Tensor:
    """(N, C) or (C,) with two dimensions more, to go with (N, C, H, W)."""
    return v[..., None, None]


def statistics(x: Tensor, batch: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Instance means (N, C) and, if `batch`, mean and biased variance of the batch."""
    wide = x.to(wide_dtype(x))
    mean_NC = wide.mean((2, 3))
    if not batch:
        return mean_NC, None, None
    mean = mean_NC.mean(0)
    return mean_NC, mean, (wide - _plane(mean)).square_().mean((0, 2, 3))


def normalize(
    x: Tensor,
    mean_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the gates, and the scales `gate * weight / sqrt(var + eps)`, (N, C) both."""
    dtype = mean.dtype
    gate_NC = torch.addcmul(gate_bias.to(dtype), gate_weight.to(dtype), mean_NC).sigmoid_()
    scale_NC = gate_NC * torch.rsqrt(var + eps)
    if weight is not None:
        scale_NC = scale_NC * weight.to(dtype)
    y = (x.to(dtype) - _plane(mean)).mul_(_plane(scale_NC))
    if bias is not None:
        y += _plane(bias.to(dtype))
    return y.to(x.dtype), gate_NC, scale_NC


def reduce(
    g: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    gate_NC: Tensor,
    scale_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
) -> tuple[Tensor, ...]:
    """With `g` the gradient of the output and `xhat` the normalised input: the gradient `dz_NC` of what is under the
    sigmoid, those of weight, bias, gate_weight and gate_bias, and over the batch the sums of `scale * g` and of
    `scale * g * xhat`, which reach the input through the statistics.
    """
    dtype = mean.dtype
    g = g.to(dtype)
    P_NC = g.sum((2, 3))
    Q_NC = (x.to(dtype) - _plane(mean)).mul_(g).sum((2, 3)) * torch.rsqrt(var + eps)
    dweight_NC = gate_NC * Q_NC
    dz_NC = dweight_NC * (1 - gate_NC)
    if weight is not None:
        dz_NC = dz_NC * weight.to(dtype)
    rows = (dweight_NC, P_NC, dz_NC * mean_NC, dz_NC, scale_NC * P_NC, scale_NC * Q_NC)
    return dz_NC, *(row.sum(0) for row in rows)


def grad_input(
    g: Tensor,
    x: Tensor,
    scale_NC: Tensor,
    dz_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    gate_weight: Tensor,
    sum_g: Tensor,
    sum_gx: Tensor,
    count: float | Tensor,
) -> Tensor:
    """The gradient of `x`, in its dtype. `sum_g` and `sum_gx` are the last two results of `reduce`, over `count` values
    per channel; a `count` of 0 says that mean and variance are constants.
    """
    dtype = mean.dtype
    shift_NC = dz_NC * (gate_weight.to(dtype) / (x.shape[2] * x.shape[3]))
    batch = isinstance(count, Tensor) or count > 0
    if batch:
        shift_NC = shift_NC - sum_g / count
    dx = torch.addcmul(_plane(shift_NC), g.to(dtype), _plane(scale_NC))
    if batch:
        slope = sum_gx * torch.rsqrt(var + eps) / count
        dx.addcmul_(x.to(dtype) - _plane(mean), _plane(slope), value=-1)
    return dx.to(x.dtype)
