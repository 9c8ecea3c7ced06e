"""IEBN with its gradient in closed form, in plain torch operations: the path of eager training and inference.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here the forward pass is one
multiply-add with a scale and a shift per instance and channel, and the backward pass needs two sums per instance and
channel (`P` and `Q` below), then two multiply-adds. Names carry shapes: `gate_NC` is (N, C).
"""

import threading
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import iebn_reference, update_running, wide_dtype

CHUNK = 1 << 20  # elements of a temporary on CPU; temporaries are kept, because fresh pages cost more than arithmetic

_kept = threading.local()


def _chunks(*tensors: Tensor) -> list[tuple[Tensor, ...]]:
    """`tensors`, cut along the batch where they are large and on CPU, so that a temporary of a slice is small."""
    x = tensors[0]
    if x.device.type != "cpu" or x.numel() <= 2 * CHUNK:
        return [tensors]
    step = max(1, CHUNK * x.shape[0] // x.numel())
    return list(zip(*(t.split(step) for t in tensors), strict=True))


def _scratch(like: Tensor, dtype: torch.dtype, slot: int) -> Tensor:
    """Uninitialised memory of the shape and layout of `like`, valid until this thread asks for `slot` again."""
    dense = like.is_contiguous() or like.is_contiguous(memory_format=torch.channels_last)
    if like.device.type != "cpu" or not dense or like.numel() > 2 * CHUNK:
        return torch.empty_like(like, dtype=dtype)
    slots = _kept.__dict__
    flat = slots.get((slot, dtype))
    if flat is None or flat.numel() < like.numel():
        with torch.inference_mode(False):  # a tensor made in inference mode can't be written to outside
            flat = slots[slot, dtype] = torch.empty(like.numel(), dtype=dtype)
    return flat.as_strided(like.shape, like.stride())


def _widen(x: Tensor, dtype: torch.dtype, slot: int) -> Tensor:
    return x if x.dtype == dtype else _scratch(x, dtype, slot).copy_(x)


def _widen_small(x: Tensor, dtype: torch.dtype, slot: int) -> Tensor:
    """`x` widened once for all passes, if it is a single chunk; else `x`, to be widened in slices."""
    return _widen(x, dtype, slot) if len(_chunks(x)) == 1 else x


def _plane(v_NC: Tensor) -> Tensor:
    return v_NC.view(*v_NC.shape, 1, 1)


def _instance_means(x: Tensor, dtype: torch.dtype) -> Tensor:
    """(N, C) means over the image, in `dtype`."""
    means = [_widen(x_i, dtype, 0).mean((2, 3)) for (x_i,) in ([(x,)] if x.dtype == dtype else _chunks(x))]
    return means[0] if len(means) == 1 else torch.cat(means)


def _multiply_add(x: Tensor, scale_NC: Tensor, shift_NC: Tensor, dtype: torch.dtype) -> Tensor:
    """`scale * x + shift` in `dtype`, computed in that of the scale; may overwrite `x` if it is not of `dtype`."""
    scale, shift = _plane(scale_NC), _plane(shift_NC)
    if dtype == scale.dtype:
        return torch.addcmul(shift, x, scale)
    y = torch.empty_like(x, dtype=dtype)
    for y_i, x_i, scale_i, shift_i in _chunks(y, x, scale, shift):
        wide = _widen(x_i, scale.dtype, 0)
        y_i.copy_(torch.addcmul(shift_i, wide, scale_i, out=wide))
    return y


def _sums(g: Tensor, x: Tensor, center_C: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, C) sums over the image of `g` and of `g * (x - center)`, accumulated in `dtype`."""
    sums = []
    for g_i, x_i in _chunks(g, x):
        wide_x, wide_g, product = _widen(x_i, dtype, 0), _widen(g_i, dtype, 1), _scratch(x_i, dtype, 2)
        if center_C is None:
            torch.mul(wide_g, wide_x, out=product)
        else:
            torch.sub(wide_x, center_C.view(-1, 1, 1), out=product).mul_(wide_g)
        sums.append((wide_g.sum((2, 3)), product.sum((2, 3))))
    return sums[0] if len(sums) == 1 else tuple(torch.cat(parts) for parts in zip(*sums, strict=True))


def _multiply_add_add(
    g: Tensor, scale_NC: Tensor, x: Tensor, slope_C: Tensor, shift_NC: Tensor, dtype: torch.dtype
) -> Tensor:
    """`scale * g + slope * x + shift` in `dtype`, computed in that of the scale."""
    scale, shift, slope = _plane(scale_NC), _plane(shift_NC), slope_C.view(-1, 1, 1)
    y = torch.empty_like(x, dtype=dtype)
    for y_i, g_i, scale_i, x_i, shift_i in _chunks(y, g, scale, x, shift):
        wide_x, wide_g = _widen(x_i, scale.dtype, 0), _widen(g_i, scale.dtype, 1)
        out = y_i if dtype == scale.dtype else _scratch(wide_x, scale.dtype, 2)
        torch.addcmul(shift_i, wide_x, slope, out=out).addcmul_(wide_g, scale_i)
        if out is not y_i:
            y_i.copy_(out)
    return y


def _batch_statistics(
    x: Tensor,
    mean_NC: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean (C,), biased variance (C,) and element count per channel of the batch, over all ranks of `group`.

    Moves the running statistics, if given, towards them by `momentum` (the variance unbiased).
    """
    dtype = mean_NC.dtype
    count = x.numel() // x.shape[1]
    mean = mean_NC.mean(0)
    if x.device.type == "cpu":
        # batch norm's own kernel for the variance: it makes no temporary, and updates the running statistics
        if group is None and running_mean is not None and running_mean.dtype == dtype:
            return mean, torch.batch_norm_update_stats(x, running_mean, running_var, momentum)[1], count
        var = torch.batch_norm_update_stats(x, *x.new_zeros(2, x.shape[1], dtype=dtype), 0.0)[1]
    else:
        var = torch.var(x.to(dtype), (0, 2, 3), correction=0)
    if group is not None:
        # ranks may hold different numbers of images, so counts travel along, and deviations are merged, not squares
        local = torch.cat([mean, var * count, mean.new_tensor([count])])
        ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(ranks, local, group=group)
        means, deviations, counts = torch.stack(ranks).split([len(mean), len(mean), 1], dim=1)
        count = counts.sum()
        mean = (means * counts).sum(0) / count
        var = (deviations + counts * (means - mean) ** 2).sum(0) / count
    if running_mean is not None:
        update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
    return mean, var, count


class _IEBN(torch.autograd.Function):
    """Differentiable in x, weight, bias, gate_weight and gate_bias; `batch` says that mean and var depend on x.

    `wide` is what `_widen_small` makes of x, and may be overwritten.
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
        wide: Tensor,
        mean_NC: Tensor,
        mean: Tensor,
        var: Tensor,
        eps: float,
        batch: bool,
        count: int | Tensor,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        dtype = mean.dtype
        gate_NC = torch.addcmul(gate_bias.to(dtype), mean_NC, gate_weight.to(dtype)).sigmoid_()
        inv_C = torch.rsqrt(var + eps)
        scale_NC = gate_NC * (inv_C if weight is None else inv_C * weight)
        shift_NC = -mean * scale_NC if bias is None else torch.addcmul(bias.to(dtype), mean, scale_NC, value=-1)
        if ctx is not None:
            ctx.eps, ctx.batch, ctx.count, ctx.group = eps, batch, count, group
            ctx.save_for_backward(x, weight, bias, gate_weight, gate_bias, mean, var, mean_NC, gate_NC, scale_NC, inv_C)
        return _multiply_add(wide, scale_NC, shift_NC, x.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, mean, var, mean_NC, gate_NC, scale_NC, inv_C = ctx.saved_tensors
        inputs = (x, weight, bias, gate_weight, gate_bias)
        if torch.is_grad_enabled():  # create_graph=True: the second derivative goes through the formula
            return (*_reference_grads(ctx, inputs, mean, var, g), *(None,) * 8)

        dtype = mean.dtype
        # sum(g * x) - mean * sum(g) loses digits only where the mean dwarfs the deviation; to look would stall a GPU
        center = mean if x.device.type != "cpu" or (mean.abs() * inv_C).max() > 4 else None
        wide, wide_g = _widen_small(x, dtype, 0), _widen_small(g, dtype, 1)
        P_NC, Q_NC = _sums(wide_g, wide, center, dtype)
        if center is None:
            Q_NC = torch.addcmul(Q_NC, mean, P_NC, value=-1)
        # Q still lacks its factor inv, and dz its factor weight: (C,) tensors are cheaper to multiply
        dQ_NC = gate_NC * Q_NC
        dweight = dQ_NC.sum(0).mul_(inv_C)
        slope_C = inv_C if weight is None else inv_C * weight
        dz_NC = torch.addcmul(dQ_NC, dQ_NC, gate_NC, value=-1).mul_(slope_C)

        dx = None
        if ctx.needs_input_grad[0]:
            dm_C = gate_weight.to(dtype) / (x.shape[2] * x.shape[3])
            if ctx.batch:
                # sums over n of a*P and a*Q, both times inv; scale is a*inv
                k1_C, k2_C = (scale_NC * P_NC).sum(0), dweight * slope_C
                if ctx.group is not None:
                    k_2C = torch.stack([k1_C, k2_C])
                    dist.all_reduce(k_2C, group=ctx.group)
                    k1_C, k2_C = k_2C.unbind()
                slope_C = k2_C * inv_C / -ctx.count
                offset_C = torch.addcmul(k1_C / -ctx.count, slope_C, mean, value=-1)
                shift_NC = torch.addcmul(offset_C, dz_NC, dm_C)
                dx = _multiply_add_add(wide_g, scale_NC, wide, slope_C, shift_NC, x.dtype)
            else:
                dx = _multiply_add(wide_g, scale_NC, dz_NC * dm_C, x.dtype)
        grads = (dx, dweight, P_NC.sum(0), (dz_NC * mean_NC).sum(0), dz_NC.sum(0))
        grads = (d.to(p.dtype) if p is not None and d is not None else None for p, d in zip(inputs, grads, strict=True))
        return (*grads, *(None,) * 8)


def _reference_grads(ctx: Any, inputs: tuple[Tensor | None, ...], mean: Tensor, var: Tensor, grad: Tensor) -> list:
    if ctx.group is not None:
        raise NotImplementedError("synchronised IEBN has no second derivative: compute it in one process")
    mean, var = (None, None) if ctx.batch else (mean, var)
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
    with torch.no_grad():
        wide = _widen_small(x, dtype, 0)
        mean_NC = _instance_means(wide, dtype)
        if batch:
            mean, var, count = _batch_statistics(x, mean_NC, running_mean, running_var, momentum, group)
        else:
            mean, var, count = running_mean.to(dtype), running_var.to(dtype), 0
    args = (x, weight, bias, gate_weight, gate_bias, wide, mean_NC, mean, var, eps, batch, count, group)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return _IEBN.apply(*args)
    return _IEBN.forward(None, *args)  # an autograd.Function costs as much as a small layer
