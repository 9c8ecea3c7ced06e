"""IEBN as functions: `iebn()` checks its input and takes the path that `backend` chooses."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.onnx import is_in_onnx_export

from .activations import ACTIVATIONS, followed
from .backend import backend, fits, fuses, get_backend, is_transformed, set_backend, triton, uses_reference, uses_triton
from .eager import iebn_eager
from .reference import iebn_reference, update_running

if triton is not None:
    from .custom import iebn_op
    from .fused import iebn_fused

__all__ = [
    "backend",
    "batch_share",
    "check_input",
    "fuses",
    "get_backend",
    "iebn",
    "iebn_eager",
    "iebn_reference",
    "set_backend",
    "uses_triton",
]


def check_input(x: Tensor, num_features: int, batch: bool) -> None:
    """Raises what `iebn` documents; statistics of the `batch` ask for more than one value per channel."""
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (N, C, H, W), got {x.dim()}D input of shape {list(x.shape)}")
    if x.shape[1] != num_features:
        raise RuntimeError(f"expected {num_features} channels, got {x.shape[1]} in input of shape {list(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(
            f"IEBN is not implemented for {x.dtype} input: convert it, for example with x.float()"
        )
    if batch and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"expected more than 1 value per channel when training, got input of shape {list(x.shape)}")


def batch_share(num_batches_tracked: Tensor | None, momentum: float | None, training: bool) -> float:
    """The batch's share in the running statistics that follow; 0 where they stay."""
    if momentum is not None:
        return momentum
    if not training or num_batches_tracked is None:
        return 0.0
    return 1.0 / (float(num_batches_tracked) + 1.0)


def iebn(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    group: dist.ProcessGroup | None = None,
    residual: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """Instance Enhancement Batch Normalization of `x` (arXiv 1908.04008), the counterpart of `F.batch_norm`.

    Args:
        x: (N, C, H, W), floating point, any layout.
        weight, bias: (C,) or None for 1 and 0.
        gate_weight, gate_bias: (C,).
        running_mean, running_var, num_batches_tracked: (C,), (C,) and scalar, updated in place when `training`, used
            otherwise. Without them the statistics are always the batch's.
        training: normalise with the statistics of the batch.
        momentum: share of the batch in the updated running statistics; None for an average over all batches.
        eps: added to the variance.
        group: take the batch's statistics over all ranks of this process group.
        residual: (N, C, H, W), added to the result.
        act: the activation of it: 'relu', 'relu6', 'hard_swish', 'silu' or none. Both are fused where `fuses(x)` and
            the residual is like `x`; on CPU not with `group`.

    Returns:
        (N, C, H, W) in the dtype and layout of `x`. Statistics and gates are computed in float32 or wider.

    Raises:
        ValueError: `x` is not 4D, or training with one value per channel; no such activation.
        RuntimeError: `x` has another number of channels than the parameters, or these differ.
        NotImplementedError: `x` is not floating point.
    """
    if act not in ACTIVATIONS:
        raise ValueError(f"act must be one of {', '.join(filter(None, ACTIVATIONS))} or empty, got {act!r}")
    vectors = weight, bias, gate_weight, gate_bias, running_mean, running_var
    tracing = torch.jit.is_tracing()  # where sizes are tensors that must not be branched on
    if not tracing:
        # with several ranks one value in each is enough
        check_input(x, gate_weight.shape[0], (training or running_mean is None) and group is None)
        shape = gate_weight.shape
        if any([v is not None and v.shape != shape for v in vectors]):  # a generator would take longer
            raise RuntimeError(
                f"expected parameters of one shape, got {[v if v is None else list(v.shape) for v in vectors]}"
            )
    tensors = (x, *vectors)
    # tensor subclasses (fake, distributed) and meta tensors have no values to look at or memory to keep
    plain = type(x) is Tensor and not x.is_meta and type(residual) in (type(None), Tensor, Parameter)
    symbolic = tracing or torch.compiler.is_compiling() or not plain
    share = batch_share(num_batches_tracked, momentum, training)
    formula = uses_reference() or symbolic or is_transformed()
    if group is not None:
        y = _synchronised(*tensors, training, share, eps, group, residual, act)
    elif torch.compiler.is_compiling() and fits(x, residual) and uses_triton(x) and not is_in_onnx_export():
        y = _compiled(*tensors, training, share, eps, residual, act)
    elif formula:
        y = followed(iebn_reference(*tensors, training, share, eps), residual, act)
    else:
        y = _eager(*tensors, training, share, eps, group, residual, act)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def _eager(x: Tensor, *args: Any) -> Tensor:
    if not uses_triton(x):
        return iebn_eager(x, *args)
    *args, residual, act = args
    if fits(x, residual):
        return iebn_fused(x, *args, residual, act)
    return followed(iebn_fused(x, *args), residual, act)


# a compiler leaves the exchange between ranks, and what lies around it, as it is
_synchronised = torch.compiler.disable(_eager)


def _compiled(
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
    residual: Tensor | None,
    act: str,
) -> Tensor:
    """The fused kernels as an operator that a compiler keeps."""
    batch = training or running_mean is None
    given = (None, None) if batch else (running_mean, running_var)
    y, saved = iebn_op(x, weight, bias, gate_weight, gate_bias, residual, *given, eps, act)
    if batch and running_mean is not None:
        count = x.numel() // x.shape[1]
        with torch.no_grad():
            update_running(running_mean, running_var, saved[-2], saved[-1] * (count / (count - 1)), momentum)
    return y
