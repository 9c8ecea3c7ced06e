"""Which implementation computes IEBN: the one place where that is decided."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from . import cpu, passes

try:
    from . import triton
except ImportError:  # Triton comes with torch's CUDA builds only
    triton = None

BACKENDS = ("auto", "reference", "eager", "triton")
_chosen = "auto"


def set_backend(name: str) -> None:
    """Chooses what computes IEBN, in all threads of this process, from now on.

    Args:
        name: 'reference', the formula differentiated by autograd; 'eager', the closed-form gradient in torch's
            operations or, on CPU, in C++; 'triton', fused kernels, for CUDA; 'auto', the best one for each input.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: Triton is not installed.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and triton is None:
        raise RuntimeError("the backend 'triton' needs Triton: pip install triton")
    _chosen = name


def get_backend() -> str:
    """The name that `set_backend` was given last."""
    return _chosen


@contextmanager
def backend(name: str) -> Iterator[None]:
    """`set_backend` for the time of a `with` block. A backward pass takes what was chosen in its forward pass."""
    before = _chosen
    set_backend(name)
    try:
        yield
    finally:
        set_backend(before)


def uses_reference() -> bool:
    """Whether the formula is to be taken, whatever the input."""
    return _chosen == "reference"


@lru_cache
def _triton_works(device: torch.device) -> bool:
    """Whether Triton can compile for `device` and run there. A compiler and drivers are needed for it."""
    try:
        if torch.cuda.get_device_capability(device) < (7, 0):
            raise RuntimeError("Triton needs a GPU of compute capability 7.0 or later")
        triton.statistics(torch.zeros(1, 1, 1, 1, device=device), batch=False)
    except Exception as e:  # whatever a compiler or a driver raises
        warnings.warn(f"IEBN takes torch's operations on {device}, its fused kernels do not run: {e}", stacklevel=2)
        return False
    return True


def uses_triton(x: Tensor) -> bool:
    """Whether the fused kernels are to take `x`.

    Raises:
        RuntimeError: they are asked for and can't.
    """
    if triton is None or _chosen in ("reference", "eager") or (_chosen == "auto" and not x.is_cuda):
        return False
    if not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0:
        return False  # dispatch modes must see operations
    if not triton.supports(x):
        if _chosen == "triton" and x.numel():
            raise RuntimeError(
                f"the backend 'triton' can't take {x.dtype} input with strides {x.stride()} on {x.device}: it needs a "
                "CUDA device, float32, bfloat16 or float16, NCHW or channels last; set_backend('auto') takes all"
            )
        return False
    # who forces it sees Triton's own error, and who compiles needs Triton anyway
    return _chosen == "triton" or torch.compiler.is_compiling() or _triton_works(x.device)


def passes_for(x: Tensor) -> ModuleType:
    """The module whose four passes are to take `x`."""
    if uses_triton(x):
        return triton
    return cpu if cpu.supports(x) else passes
