"""IEBN written as its formula (arXiv 1908.04008, section 3), differentiated by autograd.

Every other path is tested against this one. It is also the path that TorchScript, tracing and torch.func take, and
without fused kernels torch.compile and export: it consists of plain differentiable torch operations only.
"""

import torch
from torch import Tensor


def wide_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which statistics and gates of `x` are computed: float32 for half types, else its own."""
    if x.dtype == torch.float16 or x.dtype == torch.bfloat16:
        return torch.float32
    return x.dtype


def update_running(
    running_mean: Tensor, running_var: Tensor, mean: Tensor, unbiased_var: Tensor, momentum: float
) -> None:
    """Moves the running statistics by `momentum` towards those of the batch, in place, as batch norm does."""
    running_mean.lerp_(mean.to(running_mean.dtype), momentum)
    running_var.lerp_(unbiased_var.to(running_var.dtype), momentum)


def iebn_reference(
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
) -> Tensor:
    """The normalised and gated input, (N, C, H, W) in the dtype of `x`; `iebn` describes the arguments."""
    dtype = wide_dtype(x)
    wide = x.to(dtype)
    instance_mean = wide.mean(dim=(2, 3))
    gate = torch.sigmoid(gate_weight.to(dtype) * instance_mean + gate_bias.to(dtype))

    if training or running_mean is None or running_var is None:
        mean = instance_mean.mean(dim=0)
        centered = wide - mean[:, None, None]
        var = (centered * centered).mean(dim=(0, 2, 3))
        if running_mean is not None and running_var is not None:
            count = x.shape[0] * x.shape[2] * x.shape[3]
            if torch.jit.is_tracing() or count > 0:  # an empty batch moves nothing
                with torch.no_grad():
                    update_running(running_mean, running_var, mean, var * (count / (count - 1)), momentum)
    else:
        mean, var = running_mean.to(dtype), running_var.to(dtype)
        centered = wide - mean[:, None, None]

    y = gate[:, :, None, None] * centered * torch.rsqrt(var + eps)[:, None, None]
    if weight is not None:
        y = y * weight.to(dtype)[:, None, None]
    if bias is not None:
        y = y + bias.to(dtype)[:, None, None]
    return y.to(x.dtype)
