"""The four passes of IEBN as Triton kernels, with a residual and an activation fused: float32, bfloat16 and float16,
NCHW and channels last.

Forward reads the input twice and writes the output once, backward reads the input and the gradient twice and writes
one gradient: batch norm's traffic. The arguments and results are those of `passes`. The kernels run on CUDA, and on CPU
in Triton's interpreter (TRITON_INTERPRET=1 before this module is imported), which is slow and for tests.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor

from . import triton_kernels as kernels
from .activations import FROM_RESULT
from .layouts import is_channels_last, is_dense, like

_TILE = 4096  # values that a program holds at once
_WARPS = 8  # that hold them: with half as many, planes of odd size, read value by value, overflow the registers
_PROGRAMS = 8  # for each multiprocessor, before planes are cut in parts
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as the kernels are, from their import on


@dataclass(frozen=True)
class _Grid:
    """How the programs of a pass over (N, C, H, W) share it."""

    programs: int
    shape: tuple[int, int, int, int]  # C, H * W, parts of a plane, values in a part
    blocks: dict[str, int | bool]
    merge_programs: int
    merge_blocks: dict[str, int]

    @property
    def parts(self) -> int:
        return self.shape[2]


def _grid(x: Tensor) -> _Grid:
    n, c, h, w = x.shape
    return _grid_of(n, c, h * w, is_channels_last(x), x.device.index if x.is_cuda else None)


@lru_cache(maxsize=4096)
def _grid_of(n: int, c: int, size: int, channels_last: bool, cuda_device: int | None) -> _Grid:
    if channels_last:
        # whole lines of memory, but few idle lanes
        block_c = min((128, 64, 32), key=lambda block: (triton.cdiv(c, block) * block, -block))
        block_c = min(block_c, triton.next_power_of_2(c))
        block_l = min(_TILE // block_c, triton.next_power_of_2(size))
    else:
        block_l = min(1024, triton.next_power_of_2(size))
        block_c = min(_TILE // block_l, triton.next_power_of_2(c))
    rows = n * triton.cdiv(c, block_c)
    properties = None if cuda_device is None else torch.cuda.get_device_properties(cuda_device)
    wanted = _PROGRAMS * (properties.multi_processor_count if properties else 2)
    # a part of less than two tiles would cost more than it shares out
    parts = max(1, min(wanted // rows, triton.cdiv(size, 2 * block_l)))
    part = triton.cdiv(triton.cdiv(size, parts), block_l) * block_l
    parts = triton.cdiv(size, part)
    blocks = dict(BLOCK_C=block_c, BLOCK_L=block_l, WIDE=c * size >= 2**31, CHANNELS_LAST=channels_last)
    aligned = dict(ALIGN_C=gcd(c, 16), ALIGN_L=gcd(size, 16))
    # few channels in a program of the merging kernels, because its time is what all others wait for
    merge = dict(BLOCK_N=min(128, triton.next_power_of_2(n)), BLOCK_C=min(8, triton.next_power_of_2(c)))
    merge["BLOCK_P"] = min(128 // merge["BLOCK_N"], triton.next_power_of_2(parts))
    merge_programs = triton.cdiv(c, merge["BLOCK_C"])
    merge["ALIGN_C"] = aligned["ALIGN_C"]
    return _Grid(rows * parts, (c, size, parts, part), blocks | aligned | dict(num_warps=_WARPS), merge_programs, merge)


def supports(x: Tensor) -> bool:
    """Whether these passes can take `x`."""
    on_device = x.is_cuda or (x.is_cpu and INTERPRETED)
    plain = torch.compiler.is_compiling() or not x.is_neg()  # which a compiler can't ask
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return on_device and is_dense(x) and plain and x.numel() > 0 and x.dtype in dtypes


def _launch(x: Tensor, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Starts a kernel on the device of `x`, where Triton would take the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def kept(residual: Tensor | None, y: Tensor, act: str) -> tuple[Tensor | None, Tensor | None]:
    """What `reduce` needs as `residual` and `result`; without a residual, it finds all it needs from the input."""
    if residual is None or not act:
        return None, None
    return (None, y) if act in FROM_RESULT else (residual, None)


def residual_gradient(x: Tensor, residual: Tensor | None, result: Tensor | None) -> Tensor | None:
    """What `reduce` fills, if `kept` has kept something: else the residual's gradient is that of the output."""
    return None if residual is None and result is None else torch.empty_like(x)


def _dense(v: Tensor | None) -> Tensor | None:
    return None if v is None else v.resolve_neg().contiguous()


def statistics(x: Tensor, batch: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    n, c = x.shape[:2]
    grid = _grid(x)
    means = x.new_empty(n, grid.parts, c, dtype=torch.float32)
    squares, mean, var = (means.new_empty(shape) if batch else None for shape in (means.shape, c, c))
    _launch(x, kernels.statistics_kernel, grid.programs, x, means, squares, *grid.shape, **grid.blocks)
    mean_NC = means.new_empty(n, c) if grid.parts > 1 else None
    if batch or grid.parts > 1:
        tensors = means, squares, mean_NC, mean, var
        merge = kernels.merge_statistics_kernel
        _launch(x, merge, grid.merge_programs, *tensors, n, *grid.shape, **grid.merge_blocks)
    return means.view(n, c) if mean_NC is None else mean_NC, mean, var


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
    residual: Tensor | None = None,
    act: str = "",
) -> tuple[Tensor, Tensor]:
    grid = _grid(x)
    y, gate_NC = torch.empty_like(x), torch.empty_like(mean_NC)
    residual = None if residual is None else like(residual, x)
    vectors = map(_dense, (mean, var, weight, bias, gate_weight, gate_bias))
    tensors = x, residual, y, mean_NC, *vectors, gate_NC
    _launch(x, kernels.normalize_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
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
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    result: Tensor | None = None,
    dresidual: Tensor | None = None,
    act: str = "",
) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
    """With `act`, also: its input is found from `result`, or from `bias` and `residual`; `dresidual` is filled with the
    gradient of that input, if it is given.
    """
    n, c = x.shape[:2]
    grid = _grid(x)
    residual, result = (None if t is None else like(t, x) for t in (residual, result))
    mean, var, weight, bias, mean_NC, gate_NC = map(_dense, (mean, var, weight, bias, mean_NC, gate_NC))
    P, Q = gate_NC.new_empty(2, n, grid.parts, c)
    tensors = g, x, result, residual, dresidual, gate_NC, mean, var, weight, bias, P, Q
    _launch(x, kernels.reduce_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
    dz_NC, grads, sums = torch.empty_like(gate_NC), mean.new_empty(4, c), mean.new_empty(2, c)
    tensors = P, Q, mean_NC, gate_NC, dz_NC, var, weight, grads, sums
    merge = kernels.merge_gradients_kernel
    _launch(x, merge, grid.merge_programs, *tensors, n, c, grid.parts, eps, **grid.merge_blocks)
    return dz_NC, grads.unbind(), sums


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
    bias: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """With `act`, `g` is the gradient of its result, and its input is found from `bias`."""
    grid = _grid(x)
    dx = torch.empty_like(x)
    if isinstance(count, Tensor):
        sums, count = sums / count, 1.0
    vectors = map(_dense, (gate_NC, dz_NC, mean, var, weight, bias, gate_weight))
    tensors, count = (g, x, dx, *vectors, sums if count else None), float(count)
    _launch(x, kernels.grad_input_kernel, grid.programs, *tensors, *grid.shape, eps, count, ACT=act, **grid.blocks)
    return dx
