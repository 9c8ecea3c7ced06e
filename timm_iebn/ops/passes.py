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


def _slope(var: Tensor, eps: float, weight: Tensor | None) -> Tensor:
    """By what batch norm multiplies the centred input."""
    inv = torch.rsqrt(var + eps)
    return inv if weight is None else inv * weight.to(inv.dtype)


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
) -> tuple[Tensor, Tensor]:
    """The output, and the gates (N, C)."""
    dtype = mean.dtype
    gate_NC = torch.addcmul(gate_bias.to(dtype), gate_weight.to(dtype), mean_NC).sigmoid_()
    y = (x.to(dtype) - _plane(mean)).mul_(_plane(gate_NC * _slope(var, eps, weight)))
    if bias is not None:
        y += _plane(bias.to(dtype))
    return y.to(x.dtype), gate_NC


def reduce(
    g: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    gate_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """With `g` the gradient of the output: the gradient `dz_NC` of what is under the sigmoid; those of weight, bias,
    gate_weight and gate_bias; and what reaches the input through mean and variance, the sums over the batch of
    `scale * g` and of `scale * g * xhat`, (2, C), with `scale = gate * weight / sqrt(var + eps)`.
    """
    dtype = mean.dtype
    g = g.to(dtype)
    P_NC = g.sum((2, 3))
    Q_NC = (x.to(dtype) - _plane(mean)).mul_(g).sum((2, 3)) * torch.rsqrt(var + eps)
    gateP, gateQ = (gate_NC * P_NC).sum(0), gate_NC * Q_NC
    dz_NC = gateQ * (1 - gate_NC)
    if weight is not None:
        dz_NC = dz_NC * weight.to(dtype)
    dweight = gateQ.sum(0)
    grads = dweight, P_NC.sum(0), (dz_NC * mean_NC).sum(0), dz_NC.sum(0)
    return dz_NC, grads, torch.stack([gateP, dweight]) * _slope(var, eps, weight)


def grad_input(
    g: Tensor,
    x: Tensor,
    gate_NC: Tensor,
    dz_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate_weight: Tensor,
    sums: Tensor,
    count: float | Tensor,
) -> Tensor:
    """The gradient of `x`, in its dtype. `sums` are those of `reduce`, over `count` values per channel; a `count` of 0
    says that mean and variance are constants.
    """
    dtype = mean.dtype
    shift_NC = dz_NC * (gate_weight.to(dtype) / (x.shape[2] * x.shape[3]))
    batch = isinstance(count, Tensor) or count > 0
    if batch:
        sum_g, sum_gx = sums / count
        shift_NC = shift_NC - sum_g
    dx = torch.addcmul(_plane(shift_NC), g.to(dtype), _plane(gate_NC * _slope(var, eps, weight)))
    if batch:
        dx.addcmul_(x.to(dtype) - _plane(mean), _plane(sum_gx * torch.rsqrt(var + eps)), value=-1)
    return dx.to(x.dtype)
