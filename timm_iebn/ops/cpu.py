"""The four passes of IEBN on CPU in C++ (`_cpu.cpp`): float32 and bfloat16, NCHW and channels last.

They read and write what batch norm does, and make no temporary of the input's size. `forward` and `backward` make two
passes in one call, and take in an addition and an activation behind the layer. They are compiled when the package is
installed, where there is a compiler that can; everywhere else, `library` is None and `passes` does the same in torch
operations. The arguments and results are those of `passes`.
"""

import ctypes
import importlib.util
import platform
import warnings
from ctypes import c_double, c_int, c_int64, c_void_p

import torch  # before the library, so that both use one pool of threads
from torch import Tensor

from .activations import ACTIVATIONS
from .layouts import is_channels_last, is_dense, like


class _Pointer:
    """Of a tensor, or of none. The library is given tensors, because a pointer would not keep its own alive."""

    @staticmethod
    def from_param(t: Tensor | None) -> c_void_p | None:
        return None if t is None else c_void_p(t.data_ptr())


_INTERFACE = 7  # of `_cpu.cpp`; both change when arguments do
_ACTS = {name: number for number, name in enumerate(ACTIVATIONS)}  # in the order of `with_activation`
_SHAPE = [c_int64] * 3 + [c_int] * 3
_FORWARD = [_Pointer] * 4 + [c_double] + [_Pointer] * 6 + [c_int, _Pointer]
_ARGUMENTS = {
    "statistics": [_Pointer] * 4,
    "normalize": _FORWARD,
    "forward": _FORWARD,
    "infer": _FORWARD,
    "reduce": [_Pointer] * 6 + [c_double] + [_Pointer] * 7,
    "grad_input": [_Pointer] * 6 + [c_double] + [_Pointer] * 3 + [c_double, _Pointer],
    "backward": [_Pointer] * 6 + [c_double] + [_Pointer] * 4 + [c_int] + [_Pointer] * 7 + [c_double, _Pointer],
}


def _check(had_memory: int, *_: object) -> None:
    if not had_memory:
        raise RuntimeError("not enough memory for the sums of IEBN: use smaller batches")


def load(capability: str) -> ctypes.CDLL | None:
    """The library for a processor of this `torch.backends.cpu.get_cpu_capability`; None where there is none."""
    x86 = platform.machine() in ("x86_64", "AMD64")
    spec = importlib.util.find_spec(f"{__package__}.{'_cpu_avx512' if capability == 'AVX512' else '_cpu'}")
    if spec is None or (x86 and capability in ("DEFAULT", "NO AVX")):
        return None
    try:
        library = ctypes.CDLL(spec.origin)
        if c_int.in_dll(library, "iebn_interface").value != _INTERFACE:
            raise ValueError("it is of another version")
    except (OSError, ValueError) as e:  # ValueError: no such name
        warnings.warn(f"{spec.origin} is not used, install timm-iebn again: {e}", stacklevel=2)
        return None
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"iebn_{name}")
        function.argtypes, function.errcheck = _SHAPE + arguments, _check
    return library


library = load(torch.backends.cpu.get_cpu_capability())


def supports(x: Tensor) -> bool:
    """Whether these passes can take `x`."""
    return (
        library is not None
        and x.is_cpu
        and x.layout == torch.strided
        and (x.dtype == torch.float32 or x.dtype == torch.bfloat16)
        and is_dense(x)
        and not x.is_neg()
        and x.numel() > 0
    )


def _shape(x: Tensor) -> tuple[int, ...]:
    n, c, h, w = x.shape
    return n, c, h * w, is_channels_last(x), x.dtype == torch.bfloat16, torch.get_num_threads()


def _dense(shape: torch.Size, *tensors: Tensor | None) -> list[Tensor | None]:
    """`tensors`, each None or of `shape`, as the library reads them: what comes back from autograd may differ."""
    dense = []
    for v in tensors:
        if v is not None:
            if v.shape != shape or not v.is_cpu:
                raise RuntimeError(
                    f"expected a tensor of shape {list(shape)} on cpu, got {list(v.shape)} on {v.device}"
                )
            if v.dtype is not torch.float32 or not v.is_contiguous() or v.is_neg():
                v = v.detach().float().contiguous().resolve_neg()
        dense.append(v)
    return dense


def statistics(x: Tensor, batch: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    mean_NC = x.new_empty(x.shape[:2], dtype=torch.float32)
    mean, var = (mean_NC.new_empty(x.shape[1]) if batch else None for _ in range(2))
    library.iebn_statistics(*_shape(x), x, mean_NC, mean, var)
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
    mean, var, *params = _dense(x.shape[1:2], mean, var, weight, bias, gate_weight, gate_bias)
    library.iebn_normalize(*_shape(x), x, mean_NC, mean, var, eps, *params, gate_NC, None, 0, y)
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
    mean_NC, gate_NC = _dense(x.shape[:2], mean_NC, gate_NC)
    mean, var, weight = _dense(x.shape[1:2], mean, var, weight)
    dz_NC, sums = torch.empty_like(mean_NC), mean.new_empty(2, x.shape[1])
    grads = tuple(torch.empty_like(mean) for _ in range(4))
    library.iebn_reduce(*_shape(x), g, x, mean_NC, gate_NC, mean, var, eps, weight, dz_NC, *grads, sums)
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
    (gate_NC,), dx = _dense(x.shape[:2], gate_NC), torch.empty_like(x)
    mean, var, weight, gate_weight = _dense(x.shape[1:2], mean, var, weight, gate_weight)
    inputs = g, x, gate_NC, dz_NC, mean, var
    library.iebn_grad_input(*_shape(x), *inputs, eps, weight, gate_weight, sums, float(count), dx)
    return dx


def forward(
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    keep: bool,
    residual: Tensor | None = None,
    act: str = "",
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
    """The output, with `residual` of its shape added and `act` applied; instance means and gates (N, C), if they are to
    be kept or the batch's mean and variance are taken; mean and variance (C,), the batch's where none are given.
    """
    y, mean_NC, gate_NC, function = torch.empty_like(x), None, None, library.iebn_infer
    if keep or mean is None:
        mean_NC, gate_NC = (x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))
    if mean is None:
        mean, var = (mean_NC.new_empty(x.shape[1]) for _ in range(2))
        function = library.iebn_forward
    mean_C, var_C, *params = _dense(x.shape[1:2], mean, var, weight, bias, gate_weight, gate_bias)
    residual = None if residual is None else like(residual, x)
    function(*_shape(x), x, mean_NC, mean_C, var_C, eps, *params, gate_NC, residual, _ACTS[act], y)
    return y, mean_NC, gate_NC, mean, var


def backward(
    g: Tensor,
    x: Tensor,
    mean_NC: Tensor,
    gate_NC: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    residual: Tensor | None,
    result: Tensor | None,
    act: str,
    count: int,
    needs_dx: bool,
    needs_dresidual: bool,
) -> tuple[Tensor | None, tuple[Tensor, ...], Tensor]:
    """The gradients of `x`; of weight, bias, gate_weight and gate_bias; and of a residual. The input of `act` is found
    from `residual` or `result`, of which one or none was kept, and `x`.
    """
    mean_NC, gate_NC = _dense(x.shape[:2], mean_NC, gate_NC)
    mean, var, weight, bias, gate_weight = _dense(x.shape[1:2], mean, var, weight, bias, gate_weight)
    behind = residual if result is None else result
    behind = None if behind is None else like(behind, x)
    g, dz_NC, room = like(g, x), torch.empty_like(mean_NC), mean.new_empty(6, x.shape[1])
    dx = torch.empty_like(x) if needs_dx else None
    before = g  # the gradient before `act`, which lies where `dx` will if no one asks for it
    if act:
        before = torch.empty_like(x) if needs_dresidual or dx is None else dx
    grads = room[:4].unbind()
    inputs = g, x, mean_NC, gate_NC, mean, var
    params, results = (weight, bias, gate_weight, behind), (before, dz_NC, *grads, room[4:])
    library.iebn_backward(*_shape(x), *inputs, eps, *params, _ACTS[act], *results, count, dx)
    return dx, grads, before
