"""The fused kernels as torch custom operators, which torch.compile and torch.export keep whole in their graphs."""

from typing import Any

import torch
from torch import Tensor

from . import triton
from .activations import kept
from .fused import backward, forward


@torch.library.custom_op("timm_iebn::iebn", mutates_args=())
def iebn_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    residual: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor]:
    """The output (N, C, H, W), and what `triton_kernels` calls `saved`; mean and biased variance are those of the batch
    where none are given.
    """
    vectors = [v.shape for v in (weight, bias, gate_weight, gate_bias, mean, var) if v is not None]
    fits = all(shape == x.shape[1:2] for shape in vectors) and (residual is None or residual.shape == x.shape)
    if not (fits and triton.supports(x)):
        raise RuntimeError(
            f"timm_iebn::iebn can't take {x.dtype} input of shape {list(x.shape)} with strides {x.stride()} on "
            f"{x.device} and vectors of shapes {list(map(list, vectors))}: timm_iebn.ops.iebn takes all"
        )
    batch = mean is None
    y, saved, _ = forward(x, weight, bias, gate_weight, gate_bias, residual, mean, var, batch, 0.0, eps, None, act)
    return y, saved


@iebn_op.register_fake
def _fake_iebn(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty((2 * x.shape[0] + 2, x.shape[1]), dtype=torch.float32)


@torch.library.custom_op("timm_iebn::iebn_backward", mutates_args=())
def iebn_backward_op(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    saved: Tensor,
    batch: bool,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `x`; of the residual behind which there is an activation, or an empty tensor; and of weight,
    bias, gate_weight and gate_bias, (4, C).
    """
    count, has_dresidual = x.numel() // x.shape[1] if batch else 0, residual is not None or result is not None
    args = weight, bias, gate_weight, residual, result, saved, count, eps, None, act
    dx, dresidual, found = backward(g, x, *args)
    return dx, dresidual if has_dresidual else x.new_empty(0), found[:4].clone()


@iebn_backward_op.register_fake
def _fake_iebn_backward(
    g: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    dresidual = triton.residual_gradient(x, residual, result)
    grads = x.new_empty((4, x.shape[1]), dtype=torch.float32)
    return torch.empty_like(x), x.new_empty(0) if dresidual is None else dresidual, grads


def _save(ctx: Any, inputs: tuple, output: tuple) -> None:
    x, weight, bias, gate_weight, _, residual, mean, _, ctx.eps, ctx.act = inputs
    y, saved = output
    ctx.batch, ctx.has_residual = mean is None, residual is not None
    ctx.save_for_backward(x, weight, bias, gate_weight, *kept(residual, y, ctx.act), saved)
    ctx.mark_non_differentiable(saved)


def _backward(ctx: Any, g: Tensor, *_: Any) -> tuple:
    _, weight, bias, *_ = tensors = ctx.saved_tensors
    dx, dresidual, grads = iebn_backward_op(g, *tensors, ctx.batch, ctx.eps, ctx.act)
    dweight, dbias, dgate_weight, dgate_bias = grads.unbind()
    if not ctx.has_residual:
        dresidual = None
    elif not ctx.act:
        dresidual = g
    params = None if weight is None else dweight, None if bias is None else dbias, dgate_weight, dgate_bias
    return dx, *params, dresidual, None, None, None, None


iebn_op.register_autograd(_backward, setup_context=_save)
