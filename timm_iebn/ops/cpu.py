"""The four passes of IEBN on CPU in C++ (`_cpu.cpp`): float32 and bfloat16, NCHW and channels last.

They read and write what batch norm does, and make no temporary of the input's size. They are compiled when the package
is installed, where there is a compiler that can; everywhere else, `library` is None and `passes` does the same in torch
operations. The arguments and results are those of `passes`.
"""

import ctypes
import importlib.util
import platform
import warnings
from ctypes import c_double, c_int, c_long, c_void_p

import torch  # before the library, so that both use one pool of threads
from torch import Tensor

_INTERFACE = 2  # of `_cpu.cpp`; both change when arguments do
_SHAPE = [c_long] * 3 + [c_int] * 3
_ARGUMENTS = {
    "statistics": [c_void_p] * 4,
    "normalize": [c_void_p] * 4 + [c_double] + [c_void_p] * 6,
    "reduce": [c_void_p] * 6 + [c_double] + [c_void_p] * 7,
    "grad_input": [c_void_p] * 6 + [c_double] + [c_void_p] * 3 + [c_double, c_void_p],
}


def _load() -> ctypes.CDLL | None:
    spec = importlib.util.find_spec(f"{__package__}._cpu")
    x86 = platform.machine() in ("x86_64", "AMD64")
    if spec is None or (x86 and torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "NO AVX")):
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        if c_int.in_dll(library, "iebn_interface").value != _INTERFACE:
            raise ValueError
    except (OSError, ValueError):  # ValueError: no such name
        warnings.warn(f"{spec.origin} is of another version and not used: install timm-iebn again", stacklevel=2)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"iebn_{name}")
        function.argtypes, function.restype = _SHAPE + arguments, None
    return library


library = _load()


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def supports(x: Tensor) -> bool:
    """Whether these passes can take `x`. Dispatch modes must see operations, which calls to the library are not."""
    return (
        library is not None
        and x.is_cpu
        and x.layout == torch.strided
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and (x.is_contiguous() or _is_channels_last(x))
        and torch._C._len_torch_dispatch_stack() == 0
    )


def _shape(x: Tensor) -> tuple[int, ...]:
    n, c, h, w = x.shape
    return n, c, h * w, _is_channels_last(x), x.dtype == torch.bfloat16, torch.get_num_threads()


def _vector(v: Tensor | None, x: Tensor) -> Tensor | None:
    """A parameter or statistic as the library reads it."""
    if v is None:
        return None
    if v.shape != (x.shape[1],) or not v.is_cpu:
        raise RuntimeError(f"expected a tensor of shape [{x.shape[1]}] on cpu, got {list(v.shape)} on {v.device}")
    return v if v.dtype == torch.float32 and v.is_contiguous() else v.detach().float().contiguous()


def _pointer(t: Tensor | None) -> int | None:
    return None if t is None else t.data_ptr()


def statistics(x: Tensor, batch: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean_NC = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean, var = (mean_NC.new_empty(x.shape[1]) if batch else None for _ in range(2))
    library.iebn_statistics(*_shape(x), *map(_pointer, (x, mean_NC, mean, var)))
    return mean_NC, mean, var


def normalize(
    x: Tensor,
    mean_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    y, gate_NC = torch.empty_like(x), torch.empty_like(mean_NC)
    # kept in a list, because a pointer does not keep its tensor alive
    vectors = [_vector(v, x) for v in (mean, var, weight, bias, gate_weight, gate_bias)]
    mean_p, var_p, *params = map(_pointer, vectors)
    inputs = _pointer(x), _pointer(mean_NC), mean_p, var_p
    library.iebn_normalize(*_shape(x), *inputs, eps, *params, _pointer(gate_NC), _pointer(y))
    return y, gate_NC


def reduce(
    g: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    gate_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    weight, dz_NC = _vector(weight, x), torch.empty_like(mean_NC)
    grads, sums = tuple(torch.empty_like(mean) for _ in range(4)), mean.new_empty(2, x.shape[1])
    inputs = map(_pointer, (g, x, mean_NC, gate_NC, mean, var))
    results = map(_pointer, (weight, dz_NC, *grads, sums))
    library.iebn_reduce(*_shape(x), *inputs, eps, *results)
    return dz_NC, grads, sums


def grad_input(
    g: Tensor,
    x: Tensor,
    gate_NC: Tensor,
    dz_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    gate_weight: Tensor,
    sums: Tensor,
    count: float | Tensor,
) -> Tensor:
    weight, gate_weight, dx = _vector(weight, x), _vector(gate_weight, x), torch.empty_like(x)
    inputs = map(_pointer, (g, x, gate_NC, dz_NC, mean, var))
    params = map(_pointer, (weight, gate_weight, sums))
    library.iebn_grad_input(*_shape(x), *inputs, eps, *params, float(count), dx.data_ptr())
    return dx
