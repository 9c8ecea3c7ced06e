"""IEBN with its gradient in closed form, in plain torch operations: the path of eager training and inference.

Autograd through the formula keeps and rereads half a dozen (N, C, H, W) tensors. Here the forward pass is one
multiply-add with a scale and a shift per instance and channel, and the backward pass needs two sums per instance and
channel (`P` and `Q` below), then two multiply-adds. Names carry shapes: `gate_NC` is (N, C).
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .reference import iebn_reference, widen


def _plane(v_NC: Tensor) -> Tensor:
    return v_NC[:, :, None, None]


def _batch_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, int | Tensor]:
    """Mean (C,), biased variance (C,) and element count per channel of the batch, over all ranks of `group`."""
    wide = widen(x)
    count = x.numel() // x.shape[1]
    if x.device.type == "cpu":
        # batch norm's own kernel for them: it subtracts the mean before it squares, and makes no temporary
        unused = wide.new_zeros(2, x.shape[1])
        mean, var = torch.batch_norm_update_stats(x, unused[0], unused[1], 0.0)
    else:
        var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    if group is None:
        return mean, var, count
    # ranks may hold different numbers of images, so counts travel along, and deviations are merged, not squares
    local = torch.cat([mean, var * count, mean.new_tensor([count])])
    ranks = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(ranks, local, group=group)
    means, deviations, counts = torch.stack(ranks).split([len(mean), len(mean), 1], dim=1)
    total = counts.sum()
    mean = (means * counts).sum(0) / total
    var = (deviations + counts * (means - mean) ** 2).sum(0) / total
    return mean, var, total


class _IEBN(torch.autograd.Function):
    """Differentiable in x, weight, bias, gate_weight and gate_bias; `batch` says that mean and var depend on x."""

    @staticmethod
    def forward(x, weight, bias, gate_weight, gate_bias, mean, var, eps, batch, count, group):  # noqa: ANN001, ANN205
        wide = widen(x)
        mean_NC = wide.mean((2, 3))
        gate_NC = torch.sigmoid(torch.addcmul(gate_bias.to(wide.dtype), mean_NC, gate_weight.to(wide.dtype)))
        inv_C = torch.rsqrt(var + eps)
        scale_NC = gate_NC * (inv_C if weight is None else inv_C * weight)
        shift_NC = -mean * scale_NC if bias is None else torch.addcmul(bias.to(wide.dtype), mean, scale_NC, value=-1)
        y = torch.addcmul(_plane(shift_NC), wide, _plane(scale_NC)).to(x.dtype)
        return y, mean_NC, gate_NC, inv_C

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        x, weight, bias, gate_weight, gate_bias, mean, var, ctx.eps, ctx.batch, ctx.count, ctx.group = inputs
        _, mean_NC, gate_NC, inv_C = output
        ctx.mark_non_differentiable(mean_NC, gate_NC, inv_C)
        ctx.save_for_backward(x, weight, bias, gate_weight, gate_bias, mean, var, mean_NC, gate_NC, inv_C)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
        x, weight, bias, gate_weight, gate_bias, mean, var, mean_NC, gate_NC, inv_C = ctx.saved_tensors
        inputs = (x, weight, bias, gate_weight, gate_bias)
        if torch.is_grad_enabled():  # create_graph=True: the second derivative goes through the formula
            return (*_reference_grads(ctx, inputs, mean, var, grad), *(None,) * 6)

        wide, g = widen(x), widen(grad)
        P_NC = g.sum((2, 3))
        Q_NC = torch.addcmul((g * wide).sum((2, 3)), mean, P_NC, value=-1) * inv_C
        dQ_NC = gate_NC * Q_NC
        dweight = dQ_NC.sum(0)
        dbias = P_NC.sum(0)
        dz_NC = dQ_NC * (1 - gate_NC)
        a_NC = gate_NC
        if weight is not None:
            dz_NC, a_NC = dz_NC * weight, gate_NC * weight
        dgate_weight, dgate_bias = (dz_NC * mean_NC).sum(0), dz_NC.sum(0)

        dx = None
        if ctx.needs_input_grad[0]:
            offset_NC = dz_NC * (gate_weight.to(wide.dtype) / (x.shape[2] * x.shape[3]))
            scale_NC = a_NC * inv_C
            if ctx.batch:
                k_2C = torch.stack([(a_NC * P_NC).sum(0), (a_NC * Q_NC).sum(0)])
                if ctx.group is not None:
                    dist.all_reduce(k_2C, group=ctx.group)
                k1_C, k2_C = (k_2C * inv_C / ctx.count).unbind()
                slope_C = -k2_C * inv_C
                offset_NC = offset_NC - (k1_C + slope_C * mean)
                dx = torch.addcmul(_plane(offset_NC), wide, slope_C[:, None, None]).addcmul_(g, _plane(scale_NC))
            else:
                dx = torch.addcmul(_plane(offset_NC), g, _plane(scale_NC))
            dx = dx.to(x.dtype)
        grads = (dx, dweight, dbias, dgate_weight, dgate_bias)
        grads = (d.to(p.dtype) if p is not None and d is not None else None for p, d in zip(inputs, grads, strict=True))
        return (*grads, *(None,) * 6)


def _reference_grads(ctx: Any, inputs: tuple[Tensor | None, ...], mean: Tensor, var: Tensor, grad: Tensor) -> list:
    if ctx.group is not None:
        raise NotImplementedError("synchronised IEBN has no second derivative: convert it back with sync=False first")
    mean, var = (None, None) if ctx.batch else (mean, var)
    y, _, _ = iebn_reference(*inputs, mean, var, ctx.eps)
    wanted = [p for p, needed in zip(inputs, ctx.needs_input_grad[:5], strict=True) if needed]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[:5]]


def iebn_eager(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    group: dist.ProcessGroup | None = None,
) -> tuple[Tensor, Tensor, Tensor, int | Tensor]:
    """As `iebn_reference`, and the number of elements per channel behind the statistics.

    With `group`, batch statistics are those of all its ranks; every rank must call in the same order.
    """
    batch = mean is None or var is None
    with torch.no_grad():
        if batch:
            mean, var, count = _batch_statistics(x, group)
        else:
            count, group = x.numel() // x.shape[1], None
            mean, var = widen(mean).to(widen(x).dtype), widen(var).to(widen(x).dtype)
    y, *_ = _IEBN.apply(x, weight, bias, gate_weight, gate_bias, mean, var, eps, batch, count, group)
    return y, mean, var, count
