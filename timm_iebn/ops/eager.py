"""IEBN with its gradient in closed form: the path of eager training and inference.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here each direction takes two passes
over them, as batch norm does: `cpu` or `passes` has them, this module differentiates and synchronises.
"""

from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import cpu, passes
from .reference import iebn_reference, update_running, wide_dtype


def _merge(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the batch over all ranks, which may hold different numbers of images."""
    local = torch.cat([mean, var * count, mean.new_tensor([count])])
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    means, deviations, counts = torch.stack(ranks).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    # deviations are merged, not squares, which would cancel
    return mean, (deviations + counts * (means - mean) ** 2).sum(0) / total, total


class _IEBN(torch.autograd.Function):
    """Differentiable in x and the parameters; a `count` of 0 says that mean and var are constants.

    It has no `setup_context`, which would double its overhead; torch.func transforms take the reference instead.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        gate_weight: Tensor,
        gate_bias: Tensor,
        mean_NC: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        count: int | Tensor,
        group: dist.ProcessGroup | None,
        backend: ModuleType,
    ) -> Tensor:
        params = weight, bias, gate_weight, gate_bias
        y, gate_NC, scale_NC = backend.normalize(x, mean_NC, mean, var, eps, *params)
        if ctx is not None:
            ctx.eps, ctx.count, ctx.group, ctx.backend = eps, count, group, backend
            ctx.save_for_backward(x, *params, mean_NC, mean, var, gate_NC, scale_NC)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, mean_NC, mean, var, gate_NC, scale_NC = ctx.saved_tensors
        inputs = x, weight, bias, gate_weight, gate_bias
        if torch.is_grad_enabled():  # create_graph=True: the second derivative goes through the formula
            return (*_reference_grads(ctx, inputs, mean, var, g), *(None,) * 7)
        backend = ctx.backend
        dz_NC, *grads, sum_g, sum_gx = backend.reduce(g, x, mean_NC, gate_NC, scale_NC, mean, var, ctx.eps, weight)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.group is not None:
                sums = torch.stack([sum_g, sum_gx])
                dist.all_reduce(sums, group=ctx.group)
                sum_g, sum_gx = sums.unbind()
            dx = backend.grad_input(g, x, scale_NC, dz_NC, mean, var, ctx.eps, gate_weight, sum_g, sum_gx, ctx.count)
        grads = (None if p is None else d.to(p.dtype) for p, d in zip(inputs[1:], grads, strict=True))
        return (dx, *grads, *(None,) * 7)


def _reference_grads(ctx: Any, inputs: tuple[Tensor | None, ...], mean: Tensor, var: Tensor, grad: Tensor) -> list:
    if ctx.group is not None:
        raise NotImplementedError("synchronised IEBN has no second derivative: compute it in one process")
    mean, var = (mean, var) if ctx.count == 0 else (None, None)
    y = iebn_reference(*inputs, mean, var, training=False, momentum=0.0, eps=ctx.eps)
    wanted = [p for p, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


def iebn_eager(
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
) -> Tensor:
    """As `iebn_reference`. With `group`, the batch is that of all its ranks, which must call in the same order.

    Differentiable twice, the second time through the reference; not with `group`.
    """
    batch = training or running_mean is None
    group = group if batch else None
    dtype = wide_dtype(x)
    backend = cpu if cpu.supports(x) else passes
    with torch.no_grad():
        mean_NC, mean, var = backend.statistics(x, batch)
        if x.numel() == 0:  # a detector's empty batch: nothing moves, where 0 / 0 would
            mean_NC, mean, var = (None if t is None else torch.zeros_like(t) for t in (mean_NC, mean, var))
        count = x.numel() // x.shape[1] if batch else 0
        if not batch:
            # copies: what backward reads must be dense, and not move with the running statistics
            mean, var = (t.to(dtype, copy=True) for t in (running_mean, running_var))
        elif group is not None:
            mean, var, count = _merge(mean, var, count, group)
        if batch and running_mean is not None and (group is not None or x.numel()):
            update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
    args = (x, weight, bias, gate_weight, gate_bias, mean_NC, mean, var, eps, count, group, backend)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return _IEBN.apply(*args)
    return _IEBN.forward(None, *args)  # an autograd.Function costs as much as a small layer
