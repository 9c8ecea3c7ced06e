"""How tensors of (N, C, H, W) lie in memory: the kernels in C++ and Triton read NCHW and channels last."""

import torch
from torch import Tensor


def is_channels_last(x: Tensor) -> bool:
    """Whether `x` is dense with its channels innermost; one channel counts as NCHW."""
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def is_dense(x: Tensor) -> bool:
    """Whether `x` lies in one of the two layouts, without gaps."""
    return x.is_contiguous() or is_channels_last(x)


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the dtype and layout of `x`."""
    if t.stride() == x.stride() and t.dtype == x.dtype and not t.is_neg():
        return t
    return torch.empty_like(x).copy_(t)
