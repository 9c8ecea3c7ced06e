"""IEBN as functions: `iebn()` checks its input, chooses the path in one place and updates the running statistics."""

import torch
import torch.distributed as dist
from torch import Tensor

from .eager import iebn_eager
from .reference import iebn_reference

__all__ = ["iebn", "iebn_eager", "iebn_reference", "iebn_scriptable"]


def _check(x: Tensor, num_features: int, training: bool) -> None:
    if x.dim() != 4:
        raise ValueError(f"expected 4D input (N, C, H, W), got {x.dim()}D input of shape {list(x.shape)}")
    if x.shape[1] != num_features:
        raise RuntimeError(f"expected {num_features} channels, got {x.shape[1]} in input of shape {list(x.shape)}")
    if not x.is_floating_point():
        raise NotImplementedError(f"IEBN is not implemented for {x.dtype} input: convert it, for example with x.float()")
    if training and x.shape[0] * x.shape[2] * x.shape[3] == 1:
        raise ValueError(f"expected more than 1 value per channel when training, got input of shape {list(x.shape)}")


def _update(
    running_mean: Tensor,
    running_var: Tensor,
    num_batches_tracked: Tensor,
    mean: Tensor,
    unbiased_var: Tensor,
    momentum: float | None,
) -> None:
    """Moves the running statistics in place, as batch norm does; without momentum they are cumulative averages."""
    with torch.no_grad():
        num_batches_tracked.add_(1)
        if momentum is None:
            running_mean.add_((mean - running_mean) / num_batches_tracked)
            running_var.add_((unbiased_var - running_var) / num_batches_tracked)
        else:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_(unbiased_var.to(running_var.dtype), momentum)


def iebn_scriptable(
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
) -> Tensor:
    """`iebn` through the reference only, in the subset of Python that TorchScript compiles."""
    _check(x, gate_weight.shape[0], training)
    use_batch = training or running_mean is None or running_var is None
    y, mean, var = iebn_reference(
        x,
        weight,
        bias,
        gate_weight,
        gate_bias,
        None if use_batch else running_mean,
        None if use_batch else running_var,
        eps,
    )
    if training and running_mean is not None and running_var is not None and num_batches_tracked is not None:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        _update(running_mean, running_var, num_batches_tracked, mean, var * (count / (count - 1)), momentum)
    return y


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
) -> Tensor:
    """Instance Enhancement Batch Normalization of `x` (arXiv 1908.04008), the counterpart of `F.batch_norm`.

    Args:
        x: (N, C, H, W), floating point, any layout.
        weight, bias: (C,) or None for 1 and 0.
        gate_weight, gate_bias: (C,).
        running_mean, running_var, num_batches_tracked: (C,), (C,) and scalar; updated in place when `training`.
            Without them the statistics are always the batch's.
        training: normalise with the statistics of the batch and update the running ones.
        momentum: weight of the batch in the running statistics; None for their cumulative average.
        eps: added to the variance.
        group: take the batch's statistics over all ranks of this process group.

    Returns:
        (N, C, H, W) in the dtype and layout of `x`. Statistics and gates are computed in float32 or wider.

    Raises:
        ValueError: `x` is not 4D, or training with one value per channel.
        RuntimeError: `x` has another number of channels than the parameters.
        NotImplementedError: `x` is not floating point.
    """
    in_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    if in_graph and group is None:
        return iebn_scriptable(
            x,
            weight,
            bias,
            gate_weight,
            gate_bias,
            running_mean,
            running_var,
            num_batches_tracked,
            training,
            momentum,
            eps,
        )
    # over several ranks one value each is enough; the ranks' merged count is not known here
    _check(x, gate_weight.shape[0], training and group is None)
    use_running = not training and running_mean is not None and running_var is not None
    mean, var = (running_mean, running_var) if use_running else (None, None)
    y, mean, var, count = iebn_eager(
        x, weight, bias, gate_weight, gate_bias, mean, var, eps, group if training else None
    )
    if training and running_mean is not None and running_var is not None and num_batches_tracked is not None:
        _update(running_mean, running_var, num_batches_tracked, mean, var * (count / (count - 1)), momentum)
    return y
