"""IEBN by the kernels in Triton, with the addition and the activation behind it: the path of eager mode on CUDA.

`custom` has the same as an operator for compilers. Host time decides here what small layers cost: few tensors, few
launches, nothing asked twice.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import triton
from .activations import kept
from .eager import call, merge_statistics, of_params, reference_grads, takes_formula
from .layouts import like
from .reference import update_running


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    batch: bool,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
    act: str,
) -> tuple[Tensor, Tensor, float | Tensor]:
    """The output; what `triton_kernels` calls `saved`; and the values per channel in the batch, of all ranks."""
    count = x.shape[0] * x.shape[2] * x.shape[3] if batch else 0  # 0 says to `backward` that statistics are constants
    if group is None:
        saved = triton.statistics(x, batch, running_mean, running_var, momentum)
    else:
        saved = triton.statistics(x, batch)
        mean, var, count = merge_statistics(saved[-2], saved[-1], count, group)
        torch.stack((mean, var), out=saved[-2:])
        if running_mean is not None:
            update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
    params = weight, bias, gate_weight, gate_bias
    return triton.normalize(x, saved, eps, *params, residual=residual, act=act), saved, count


def backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    saved: Tensor,
    count: float | Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    act: str,
    needs_dx: bool = True,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """The gradients of `x` and of the residual, and what `triton_kernels` calls `found`."""
    if not triton.supports(x):  # hooks on saved tensors may have changed it
        x = x.resolve_neg().contiguous()
    g = like(g, x)
    dresidual = triton.residual_gradient(x, residual, result)
    found, dz = triton.reduce(g, x, saved, eps, weight, bias, residual, result, dresidual, act)
    if dresidual is not None:  # the gradient before the activation, which so is done with
        g, act = dresidual, ""
    dx = None
    if needs_dx:
        if group is not None:
            dist.all_reduce(found[4:6], group=group)
        dx = triton.grad_input(g, x, saved, found, dz, eps, weight, gate_weight, count, bias, act)
    return dx, g, found


class _Fused(torch.autograd.Function):
    """The layer, differentiable in x, the parameters and the residual. `forward` without a context is inference."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        y, saved, count = forward(*args)
        if ctx is not None:
            *inputs, residual = args[:6]
            ctx.eps, ctx.group, ctx.act = args[10:]
            ctx.count = count
            ctx.save_for_backward(*inputs, *kept(residual, y, ctx.act), saved)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, residual, result, saved = ctx.saved_tensors
        params = weight, bias, gate_weight, gate_bias
        if takes_formula(g):
            statistics = saved[-2], saved[-1]
            return (*reference_grads(ctx, (x, *params), *statistics, g, residual, result, ctx.act), *_NO_GRADS)
        given = weight, bias, gate_weight, residual, result, saved, ctx.count, ctx.eps, ctx.group, ctx.act
        dx, dresidual, found = backward(g, x, *given, needs_dx=ctx.needs_input_grad[0])
        grads = of_params(params, found[:4].unbind())
        return dx, *grads, dresidual if ctx.needs_input_grad[5] else None, *_NO_GRADS


_NO_GRADS = (None,) * 7  # for what `_Fused.forward` takes besides x, the parameters and the residual


def iebn_fused(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None = None,
    residual: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """As `iebn_eager`, for `x` that `uses_triton`; a `residual` like it is added, and `act` applied behind."""
    inputs = x, weight, bias, gate_weight, gate_bias, residual
    return call(_Fused, inputs, running_mean, running_var, training, momentum, eps, group, act)
