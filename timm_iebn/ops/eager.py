"""IEBN with its gradient in closed form: the path of eager training and inference.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here each direction takes two passes
over them, as batch norm does: `cpu` or `passes` has them, this module differentiates and synchronises.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import cpu, passes
from .reference import iebn_reference, update_running


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
    """The layer, differentiable in x and the parameters. `forward` without a context is inference.

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
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batch: bool,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        backend = cpu if cpu.supports(x) else passes
        mean_NC, mean, var = backend.statistics(x, batch)
        if x.numel() == 0:  # a detector's empty batch: nothing moves, where 0 / 0 would
            mean_NC, mean, var = (None if t is None else torch.zeros_like(t) for t in (mean_NC, mean, var))
        count = (
            x.shape[0] * x.shape[2] * x.shape[3] if batch else 0
        )  # 0 says to `backward` that mean and var are constants
        if not batch:
            # copies: what backward reads must be dense, and not move with the running statistics
            mean, var = (t.to(mean_NC.dtype, copy=True) for t in (running_mean, running_var))
        elif group is not None:
            mean, var, count = _merge(mean, var, count, group)
        if batch and running_mean is not None and (group is not None or x.numel()):
            update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
        y, gate_NC = backend.normalize(x, mean_NC, mean, var, eps, weight, bias, gate_weight, gate_bias)
        if ctx is not None:
            ctx.eps, ctx.count, ctx.group = eps, count, group
            ctx.save_for_backward(x, weight, bias, gate_weight, gate_bias, mean_NC, mean, var, gate_NC)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, mean_NC, mean, var, gate_NC = ctx.saved_tensors
        params = weight, bias, gate_weight, gate_bias
        if torch.is_grad_enabled():  # create_graph=True: the second derivative goes through the formula
            return (*_reference_grads(ctx, (x, *params), mean, var, g), *_NO_GRADS)
        backend = cpu if cpu.supports(x) else passes
        if backend is cpu:
            g = cpu.like(g, x)
        dz_NC, grads, sums = backend.reduce(g, x, mean_NC, gate_NC, mean, var, ctx.eps, weight)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.group is not None:
                dist.all_reduce(sums, group=ctx.group)
            dx = backend.grad_input(g, x, gate_NC, dz_NC, mean, var, ctx.eps, weight, gate_weight, sums, ctx.count)
        # autograd casts them to the parameters' dtypes
        return (dx, *(None if p is None else d for p, d in zip(params, grads, strict=True)), *_NO_GRADS)


_NO_GRADS = (None,) * 6  # for what `_IEBN.forward` takes besides x and the parameters


def _reference_grads(ctx: Any, inputs: tuple[Tensor | None, ...], mean: Tensor, var: Tensor, grad: Tensor) -> list:
    if ctx.group is not None:
        raise NotImplementedError("synchronised IEBN has no second derivative: compute it in one process")
    mean, var = (mean, var) if ctx.count == 0 else (None, None)
    # views, because one input may be a function of another, and theirs are partial derivatives
    inputs = tuple(None if t is None else t.view_as(t) for t in inputs)
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
    inputs = x, weight, bias, gate_weight, gate_bias
    args = (*inputs, running_mean, running_var, batch, momentum, eps, group if batch else None)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        return _IEBN.apply(*args)
    with torch.no_grad():
        return _IEBN.forward(None, *args)  # an autograd.Function costs as much as a small layer
