"""Which implementation computes IEBN: the one place where that is decided."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..messages import describe
from . import cpu, passes

try:
    import triton  # it comes with torch's builds for GPUs only
except ImportError:
    triton = None
else:
    from . import triton

BACKENDS = ("auto", "reference", "eager", "triton")
_chosen = "auto"
_tried: dict[torch.device, bool] = {}  # whether Triton has run there


def set_backend(name: str) -> None:
    """Chooses what computes IEBN, in all threads of this process, from now on.

    Args:
        name: 'reference', the formula differentiated by autograd; 'eager', the closed-form gradient in torch's
            operations or, on CPU, in C++; 'triton', fused kernels, for CUDA; 'auto', the best one for each input.

    Raises:
        ValueError: there is no such backend.
        RuntimeError: Triton is not installed, or there is no CUDA GPU.
    """
    global _chosen
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {name!r}")
    if name == "triton" and triton is None:
        raise RuntimeError("the backend 'triton' needs Triton: pip install triton")
    if name == "triton" and not (torch.cuda.is_available() or triton.INTERPRETED):
        raise RuntimeError("the backend 'triton' needs a CUDA GPU; 'auto' takes the best one for each input")
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


def _triton_works(device: torch.device) -> bool:
    """Whether Triton can compile for `device` and run there, for which it needs a compiler and drivers."""
    if device not in _tried:
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return True  # no time to try
        try:
            if torch.cuda.get_device_capability(device) < (7, 0):
                raise RuntimeError("Triton needs a GPU of compute capability 7.0 or later")
            triton.statistics(torch.zeros(1, 1, 1, 1, device=device), batch=False)
            _tried[device] = True
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # whatever a compiler or a driver raises
            _tried[device] = False
            reason = describe(e)
            warnings.warn(f"IEBN takes torch's operations on {device}, its kernels do not run: {reason}", stacklevel=3)
    return _tried[device]


def uses_triton(x: Tensor) -> bool:
    """Whether the fused kernels are to take `x`.

    Raises:
        RuntimeError: they are asked for and can't.
    """
    if triton is None or _chosen in ("reference", "eager") or (_chosen == "auto" and not x.is_cuda):
        return False
    if x.dim() != 4 or not x.is_floating_point():
        return False  # `iebn` says so
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


def is_transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work, of which the closed form knows nothing."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def fits(x: Tensor, residual: Tensor | None) -> bool:
    """Whether the fused kernels that take `x` take `residual` with it."""
    return residual is None or (
        residual.shape == x.shape
        and residual.dtype == x.dtype
        and residual.device == x.device
        and residual.layout == x.layout
    )


def fuses(x: Tensor) -> bool:
    """Whether a residual and an activation behind the layer are computed with it."""
    if uses_reference() or is_transformed() or torch.jit.is_tracing():
        return False
    # on CPU whoever watches, so that what is kept for backward, and so by a recomputation, does not depend on it
    return uses_triton(x) or (not torch.compiler.is_compiling() and x.dim() == 4 and cpu.supports(x))


def uses_cpu(x: Tensor) -> bool:
    """Whether the library on CPU is to take `x`: compilers and dispatch modes must see operations, no calls to it."""
    return cpu.supports(x) and torch._C._len_torch_dispatch_stack() == 0 and not torch.compiler.is_compiling()


def passes_for(x: Tensor) -> ModuleType:
    """The module whose four passes are to take `x`, which Triton does not."""
    return cpu if uses_cpu(x) else passes
