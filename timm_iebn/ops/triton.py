"""The four passes of IEBN as Triton kernels, with a residual and an activation fused: float32, bfloat16 and float16,
NCHW and channels last.

Forward reads the input twice and writes the output once, backward reads the input and the gradient twice and writes
one gradient: batch norm's traffic. The passes are those of `passes`, but hand on `saved` and `found`, which
`triton_kernels` describes. The kernels run on CUDA, and on CPU in Triton's interpreter (TRITON_INTERPRET=1 before this
module is imported), which is slow and for tests.
"""

import os
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Any

import torch
import triton
from torch import Tensor
from torch.autograd.graph import increment_version

from . import triton_kernels as kernels
from .layouts import is_channels_last, is_dense, like

_TILE = 4096  # values that a program holds at once
_WARPS = 8  # that hold them, and what merging adds up: with half as many, registers overflow (planes of odd size)
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
    merge |= dict(ALIGN_C=aligned["ALIGN_C"], num_warps=_WARPS)
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


def residual_gradient(x: Tensor, residual: Tensor | None, result: Tensor | None) -> Tensor | None:
    """What `reduce` fills, where one of them was kept: else the residual's gradient is that of the output."""
    return None if residual is None and result is None else torch.empty_like(x)


def _dense(v: Tensor | None) -> Tensor | None:
    return v if v is None or (v.is_contiguous() and not v.is_neg()) else v.resolve_neg().contiguous()


def statistics(
    x: Tensor,
    batch: bool,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    momentum: float = 0.0,
) -> Tensor:
    """`saved`: with instance means, and mean and biased variance of the `batch`, which running statistics then follow,
    or else the running statistics.
    """
    n, c = x.shape[:2]
    grid = _grid(x)
    saved = x.new_empty(2 * n + 2, c, dtype=torch.float32)
    means = saved if grid.parts == 1 else saved.new_empty(n, grid.parts, c)
    squares = saved.new_empty(n, grid.parts, c) if batch else None
    given = (None, None) if batch else (_dense(running_mean), _dense(running_var))
    _launch(x, kernels.statistics_kernel, grid.programs, x, means, squares, *given, saved, *grid.shape, **grid.blocks)
    if batch or grid.parts > 1:
        followers = (running_mean, running_var) if batch and running_mean is not None else ()
        dense = [*map(_dense, followers)]
        tensors = means, squares, *(dense or (None, None)), saved
        merge = kernels.merge_statistics_kernel
        _launch(x, merge, grid.merge_programs, *tensors, n, *grid.shape, momentum, **grid.merge_blocks)
        for follower, moved in zip(followers, dense, strict=True):
            if moved is follower:
                increment_version(follower)  # autograd does not see what kernels write
            else:
                follower.copy_(moved)
    return saved


def normalize(
    x: Tensor,
    saved: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None,
    gate_weight: Tensor,
    gate_bias: Tensor,
    residual: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """The output; the gates go to `saved`."""
    grid = _grid(x)
    y = torch.empty_like(x)
    residual = None if residual is None else like(residual, x)
    vectors = _dense(weight), _dense(bias), _dense(gate_weight), _dense(gate_bias)
    tensors = x, residual, y, saved, *vectors
    _launch(x, kernels.normalize_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
    return y


def reduce(
    g: Tensor,
    x: Tensor,
    saved: Tensor,
    eps: float,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    result: Tensor | None = None,
    dresidual: Tensor | None = None,
    act: str = "",
) -> tuple[Tensor, Tensor]:
    """`found` and `dz`. The input of `act` is found from `result`, or from `bias` and `residual`; `dresidual` is filled
    with the gradient of that input, if it is given.
    """
    n, c = x.shape[:2]
    grid = _grid(x)
    residual, result = (None if t is None else like(t, x) for t in (residual, result))
    saved, weight, bias = _dense(saved), _dense(weight), _dense(bias)
    sums = saved.new_empty(n, grid.parts, 2, c)
    tensors = g, x, result, residual, dresidual, saved, weight, bias, sums
    _launch(x, kernels.reduce_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
    found, dz = saved.new_empty(6, c), saved.new_empty(n, c)
    merge, tensors = kernels.merge_gradients_kernel, (sums, saved, weight, found, dz)
    _launch(x, merge, grid.merge_programs, *tensors, n, c, grid.parts, eps, **grid.merge_blocks)
    return found, dz


def grad_input(
    g: Tensor,
    x: Tensor,
    saved: Tensor,
    found: Tensor,
    dz: Tensor,
    eps: float,
    weight: Tensor | None,
    gate_weight: Tensor,
    count: float | Tensor,
    bias: Tensor | None = None,
    act: str = "",
) -> Tensor:
    """The gradient of `x`. Sums in `found` are over `count` values per channel, by which a `count` that is a tensor
    divides them in place; a `count` of 0 says that mean and variance are constants. With `act`, `g` is the gradient of
    its result, and its input is found from `bias`.
    """
    grid = _grid(x)
    dx = torch.empty_like(x)
    if isinstance(count, Tensor):
        found[4:6] /= count
        count = 1.0
    vectors = _dense(weight), _dense(bias), _dense(gate_weight)
    tensors, batch = (g, x, dx, _dense(saved), found, dz, *vectors), count != 0
    scalars = *grid.shape, eps, float(count)
    _launch(x, kernels.grad_input_kernel, grid.programs, *tensors, *scalars, BATCH=batch, ACT=act, **grid.blocks)
    return dx
