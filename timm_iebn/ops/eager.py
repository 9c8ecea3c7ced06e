"""IEBN with its gradient in closed form: the path of eager training and inference without Triton.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here each direction takes two passes
over them, as batch norm does: `cpu` or `passes` has them, this module differentiates and synchronises. `fused` does the
same with Triton's.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from . import cpu, passes
from .activations import ACTIVATIONS, followed, kept
from .backend import fits, is_transformed, passes_for, uses_cpu
from .layouts import like
from .reference import iebn_reference, update_running, wide_dtype


def merge_statistics(mean: Tensor, var: Tensor, count: int, group: dist.ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, variance and count of the batch over all ranks, which may hold different numbers of images."""
    local = torch.cat([mean, var * count, mean.new_full((1,), count)])
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    means, deviations, counts = torch.stack(ranks).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    # deviations are merged, not squares, which would cancel
    return mean, (deviations + counts * (means - mean) ** 2).sum(0) / total, total


class _IEBN(torch.autograd.Function):
    """The layer, differentiable in x, the parameters and the residual. `forward` without a context is inference.

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
        residual: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        batch: bool,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup | None,
        act: str,
    ) -> Tensor:
        backend, params = passes_for(x), (weight, bias, gate_weight, gate_bias)
        # 0 says to `backward` that mean and var are constants
        count = x.shape[0] * x.shape[2] * x.shape[3] if batch else 0
        mean = var = None
        if not batch:
            # for backward copies, which do not move with the running statistics
            wide, copy = wide_dtype(x), ctx is not None
            mean, var = running_mean.to(wide, copy=copy), running_var.to(wide, copy=copy)
        if backend is cpu and group is None:
            behind = dict(residual=residual, act=act)
            y, mean_NC, gate_NC, mean, var = cpu.forward(x, mean, var, eps, *params, keep=ctx is not None, **behind)
        else:
            mean_NC, *own = backend.statistics(x, batch)
            mean, var = own if batch else (mean, var)
            if x.numel() == 0:  # a detector's empty batch: nothing moves, where 0 / 0 would
                mean_NC, mean, var = map(torch.zeros_like, (mean_NC, mean, var))
            if group is not None:
                mean, var, count = merge_statistics(mean, var, count, group)
            y, gate_NC = backend.normalize(x, mean_NC, mean, var, eps, *params)
            y = followed(y, residual, act)
        if batch and running_mean is not None and (group is not None or x.numel()):
            update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
        if ctx is not None:
            ctx.backend, ctx.eps, ctx.count, ctx.group, ctx.act = backend, eps, count, group, act
            ctx.save_for_backward(x, *params, *kept(residual, y, act), mean_NC, mean, var, gate_NC)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, *behind, mean_NC, mean, var, gate_NC = ctx.saved_tensors
        params, backend = (weight, bias, gate_weight, gate_bias), ctx.backend
        if backend is cpu and not uses_cpu(x):  # hooks may have changed it, a mode may be watching
            backend = passes
        if takes_formula(g) or (ctx.act and backend is passes):
            return (*reference_grads(ctx, (x, *params), mean, var, g, *behind, ctx.act), *_NO_GRADS)
        if backend is cpu and ctx.group is None:
            needs_dx, *_, needs_dresidual = ctx.needs_input_grad[:6]
            scales = weight, bias, gate_weight, *behind, ctx.act, ctx.count, needs_dx, needs_dresidual
            dx, grads, dresidual = cpu.backward(g, x, mean_NC, gate_NC, mean, var, ctx.eps, *scales)
            return dx, *of_params(params, grads), dresidual if needs_dresidual else None, *_NO_GRADS
        if backend is cpu:
            g = like(g, x)
        dz_NC, grads, sums = backend.reduce(g, x, mean_NC, gate_NC, mean, var, ctx.eps, weight)
        dx = None
        if ctx.needs_input_grad[0]:
            if ctx.group is not None:
                dist.all_reduce(sums, group=ctx.group)
            scales = weight, gate_weight, sums, ctx.count
            dx = backend.grad_input(g, x, gate_NC, dz_NC, mean, var, ctx.eps, *scales)
        return dx, *of_params(params, grads), g if ctx.needs_input_grad[5] else None, *_NO_GRADS


def of_params(params: tuple[Tensor | None, ...], grads: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """`grads` of the parameters that there are; autograd casts them to their dtypes."""
    return tuple(None if p is None else d for p, d in zip(params, grads, strict=True))


_NO_GRADS = (None,) * 7  # for what `_IEBN.forward` takes besides x, the parameters and the residual


def takes_formula(g: Tensor) -> bool:
    """Whether a gradient is to be differentiated again (create_graph=True, forward mode), or `g` is many of them (vmap,
    is_grads_batched=True).
    """
    if torch.is_grad_enabled() or is_transformed():
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.is_legacy_batchedtensor(g)


def reference_grads(
    ctx: Any,
    inputs: tuple[Tensor | None, ...],
    mean: Tensor,
    var: Tensor,
    grad: Tensor,
    residual: Tensor | None = None,
    result: Tensor | None = None,
    act: str = "",
) -> list:
    """The gradients of x, the parameters and the residual; with create_graph=True they can be differentiated again."""
    if ctx.group is not None:
        raise NotImplementedError(
            "synchronised IEBN has no second derivative, and no gradients of many at once: compute them in one process"
        )
    mean, var = (mean, var) if ctx.count == 0 else (None, None)
    if result is not None:  # of an activation without a second derivative: its slope is all that matters
        slope = torch.func.grad(lambda end: ACTIVATIONS[act](end).sum())(result.detach())
        grad, act = grad * slope, ""
    is_twice = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, because one input may be a function of another, and theirs are partial derivatives
        inputs = tuple(None if t is None else t.view_as(t) for t in (*inputs, residual))
        y = iebn_reference(*inputs[:5], mean, var, training=False, momentum=0.0, eps=ctx.eps)
        y = followed(y, inputs[5], act)
    needed = [t is not None and need for t, need in zip(inputs, ctx.needs_input_grad, strict=False)]
    wanted = [t for t, need in zip(inputs, needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=is_twice)) if wanted else iter(())
    grads = [next(found) if need else None for need in needed]
    if residual is None and ctx.needs_input_grad[5]:  # it was added behind all this
        grads[5] = grad
    return grads


def call(
    function: type[torch.autograd.Function],
    inputs: Sequence[Tensor | None],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
    *rest: Any,
) -> Tensor:
    """`function`, whose `forward` takes no context where none of `inputs` is to be differentiated: to apply it costs as
    much as a small layer.
    """
    batch = training or running_mean is None
    args = (*inputs, running_mean, running_var, batch, momentum, eps, group if batch else None, *rest)
    if not torch.is_grad_enabled():
        return function.forward(None, *args)
    if any([t is not None and t.requires_grad for t in inputs]):  # a generator would take longer
        return function.apply(*args)
    with torch.no_grad():
        return function.forward(None, *args)


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
    residual: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """As `iebn_reference`, with `residual` added and `act` applied behind, in one where the library on CPU can. With
    `group`, the batch is that of all its ranks, which must call in the same order.

    Differentiable twice, the second time through the reference; not with `group`.
    """
    inputs = x, weight, bias, gate_weight, gate_bias
    given = running_mean, running_var, training, momentum, eps, group
    # a bare layer is not asked twice: `_IEBN` looks at the input itself
    if (act or residual is not None) and not (group is None and cpu.supports(x) and fits(x, residual)):
        return followed(call(_IEBN, (*inputs, None), *given, ""), residual, act)
    return call(_IEBN, (*inputs, residual), *given, act)
