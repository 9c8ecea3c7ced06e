"""IEBN with its gradient in closed form, in plain torch operations: the path of eager training and inference.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here the forward pass is one
multiply-add with a scale and a shift per instance and channel, and the backward pass needs two sums per instance and
channel (`P` and `Q` below), then two multiply-adds. Names carry shapes: `gate_NC` is (N, C).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import iebn_reference, update_running, wide_dtype


CHUNK = 1 << 19  # elements of a float32 temporary on CPU: 1 MiB stays in the cache, and malloc reuses its pages


def _chunks(x: Tensor) -> list[slice]:
    """Slices of the batch, so that temporaries of a slice stay small on CPU; one slice elsewhere."""
    n = x.shape[0]
    step = max(1, CHUNK * n // max(1, x.numel())) if x.device.type == "cpu" else n
    return [slice(i, min(i + step, n)) for i in range(0, n, step)]


def _multiply_add(x: Tensor, scale_NC: Tensor, shift_NC: Tensor) -> Tensor:
    """`scale * x + shift` in the dtype of `x`."""
    scale, shift = scale_NC[:, :, None, None], shift_NC[:, :, None, None]
    if x.dtype == scale.dtype:
        return torch.addcmul(shift, x, scale)
    y = torch.empty_like(x)
    for s in _chunks(x):
        y[s] = torch.addcmul(shift[s], x[s].to(scale.dtype), scale[s])
    return y


def _sums(g: Tensor, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, C) sums over the image of `g` and of `g * x`, accumulated in `dtype`."""
    g_NC, gx_NC = torch.empty(2, x.shape[0], x.shape[1], dtype=dtype, device=x.device).unbind()
    for s in _chunks(x):
        wide = g[s].to(dtype)
        torch.sum(wide, (2, 3), out=g_NC[s])
        torch.sum(wide * x[s], (2, 3), out=gx_NC[s])
    return g_NC, gx_NC


def _multiply_add_add(g: Tensor, scale_NC: Tensor, x: Tensor, slope_C: Tensor, shift_NC: Tensor) -> Tensor:
    """`scale * g + slope * x + shift` in the dtype of `x`."""
    scale, shift, slope = scale_NC[:, :, None, None], shift_NC[:, :, None, None], slope_C[:, None, None]
    y = torch.empty_like(x)
    for s in _chunks(x):
        if x.dtype == scale.dtype:
            torch.addcmul(shift[s], x[s], slope, out=y[s]).addcmul_(g[s], scale[s])
        else:
            y[s] = torch.addcmul(shift[s], x[s].to(scale.dtype), slope).addcmul_(g[s].to(scale.dtype), scale[s])
    return y


def _batch_statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    group: dist.ProcessGroup | None,
) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean (C,), biased variance (C,) and element count per channel of the batch, over all ranks of `group`.

    Moves the running statistics, if given, towards them by `momentum` (the variance unbiased).
    """
    dtype = wide_dtype(x)
    count = x.numel() // x.shape[1]
    if x.device.type == "cpu":
        # batch norm's own kernel: it subtracts the mean before it squares, makes no temporary, and updates
        if group is not None or running_mean is None or running_mean.dtype != dtype:
            mean, var = torch.batch_norm_update_stats(x, *x.new_zeros(2, x.shape[1], dtype=dtype), 0.0)
        else:
            return *torch.batch_norm_update_stats(x, running_mean, running_var, momentum), count
    else:
        var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), correction=0)
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
    """Differentiable in x, weight, bias, gate_weight and gate_bias; `batch` says that mean and var depend on x."""

    @staticmethod
    def forward(x, weight, bias, gate_weight, gate_bias, mean, var, eps, batch, count, group):  # noqa: ANN001, ANN205
        mean_NC = x.mean((2, 3), dtype=mean.dtype)
        gate_NC = torch.addcmul(gate_bias.to(mean.dtype), mean_NC, gate_weight.to(mean.dtype)).sigmoid_()
        inv_C = torch.rsqrt(var + eps)
        scale_NC = gate_NC * (inv_C if weight is None else inv_C * weight)
        shift_NC = -mean * scale_NC if bias is None else torch.addcmul(bias.to(mean.dtype), mean, scale_NC, value=-1)
        return _multiply_add(x, scale_NC, shift_NC), mean_NC, gate_NC, scale_NC, inv_C

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        *tensors, ctx.eps, ctx.batch, ctx.count, ctx.group = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, mean, var, mean_NC, gate_NC, scale_NC, inv_C = ctx.saved_tensors
        inputs = (x, weight, bias, gate_weight, gate_bias)
        if torch.is_grad_enabled():  # create_graph=True: the second derivative goes through the formula
            return (*_reference_grads(ctx, inputs, mean, var, g), *(None,) * 6)

        P_NC, gx_NC = _sums(g, x, mean.dtype)
        Q_NC = torch.addcmul(gx_NC, mean, P_NC, value=-1).mul_(inv_C)
        dQ_NC = gate_NC * Q_NC
        dweight = dQ_NC.sum(0)
        dz_NC = torch.addcmul(dQ_NC, dQ_NC, gate_NC, value=-1)
        if weight is not None:
            dz_NC.mul_(weight)

        dx = None
        if ctx.needs_input_grad[0]:
            shift_NC = dz_NC * (gate_weight / (x.shape[2] * x.shape[3]))
            if ctx.batch:
                # sums over n of a*P and a*Q, both times inv; scale is a*inv
                k1_C, k2_C = (scale_NC * P_NC).sum(0), dweight * inv_C if weight is None else dweight * weight * inv_C
                if ctx.group is not None:
                    k_2C = torch.stack([k1_C, k2_C])
                    dist.all_reduce(k_2C, group=ctx.group)
                    k1_C, k2_C = k_2C.unbind()
                slope_C = k2_C * inv_C / -ctx.count
                shift_NC.sub_(torch.addcmul(k1_C / ctx.count, slope_C, mean))
                dx = _multiply_add_add(g, scale_NC, x, slope_C, shift_NC)
            else:
                dx = _multiply_add(g, scale_NC, shift_NC)
        grads = (dx, dweight, P_NC.sum(0), (dz_NC * mean_NC).sum(0), dz_NC.sum(0))
        grads = (d.to(p.dtype) if p is not None and d is not None else None for p, d in zip(inputs, grads, strict=True))
        return (*grads, *(None,) * 6)


def _reference_grads(ctx: Any, inputs: tuple[Tensor | None, ...], mean: Tensor, var: Tensor, grad: Tensor) -> list:
    if ctx.group is not None:
        raise NotImplementedError("synchronised IEBN has no second derivative: convert it back with sync=False first")
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
    with torch.no_grad():
        if batch:
            mean, var, count = _batch_statistics(x, running_mean, running_var, momentum, group)
        else:
            dtype = wide_dtype(x)
            mean, var, count = running_mean.to(dtype), running_var.to(dtype), 0
    args = (x, weight, bias, gate_weight, gate_bias, mean, var, eps, batch, count, group)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in args[:5]):
        return _IEBN.apply(*args)[0]
    return _IEBN.forward(*args)[0]  # an autograd.Function costs as much as a small layer
