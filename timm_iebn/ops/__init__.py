"""IEBN as functions: `iebn()` checks its input and chooses the path in one place."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import forward_ad

from .eager import iebn_eager
from .reference import iebn_reference

__all__ = ["batch_share", "check_input", "iebn", "iebn_eager", "iebn_reference"]


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


def _is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which the closed form knows nothing."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


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
        running_mean, running_var, num_batches_tracked: (C,), (C,) and scalar, updated in place when `training`, used
            otherwise. Without them the statistics are always the batch's.
        training: normalise with the statistics of the batch.
        momentum: share of the batch in the updated running statistics; None for an average over all batches.
        eps: added to the variance.
        group: take the batch's statistics over all ranks of this process group.

    Returns:
        (N, C, H, W) in the dtype and layout of `x`. Statistics and gates are computed in float32 or wider.

    Raises:
        ValueError: `x` is not 4D, or training with one value per channel.
        RuntimeError: `x` has another number of channels than the parameters, or these differ.
        NotImplementedError: `x` is not floating point.
    """
    vectors = weight, bias, gate_weight, gate_bias, running_mean, running_var
    tracing = torch.jit.is_tracing()  # where sizes are tensors that must not be branched on
    if not tracing:
        # with several ranks one value in each is enough
        check_input(x, gate_weight.shape[0], (training or running_mean is None) and group is None)
        if any(v is not None and v.shape != gate_weight.shape for v in vectors):
            raise RuntimeError(
                f"expected parameters of one shape, got {[v if v is None else list(v.shape) for v in vectors]}"
            )
    tensors = (x, *vectors)
    # tensor subclasses (fake, distributed) and meta tensors have no values to look at or memory to keep
    symbolic = tracing or torch.compiler.is_compiling() or type(x) is not Tensor or x.is_meta
    share = batch_share(num_batches_tracked, momentum, training)
    if group is None and (symbolic or _is_transformed()):
        y = iebn_reference(*tensors, training, share, eps)
    else:
        y = iebn_eager(*tensors, training, share, eps, group)
    if training and num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y
