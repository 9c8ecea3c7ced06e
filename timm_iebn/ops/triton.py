"""The four passes of IEBN as Triton kernels, with a residual and an activation fused: float32, bfloat16 and float16,
NCHW and channels last.

Forward reads the input twice and writes the output once, backward reads the input and the gradient twice and writes
one gradient: batch norm's traffic. The arguments and results are those of `passes`. The kernels run on CUDA, and on CPU
in Triton's interpreter (TRITON_INTERPRET=1 before this module is imported), which is slow and for tests.

Each program of a pass takes one image, a block of channels and one of `parts` parts of its plane; what the programs
find is merged by a small kernel, in a fixed order, so that results repeat bit for bit.
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activations import FROM_RESULT

_TILE = 4096  # values that a program holds at once
_PROGRAMS = 8  # for each multiprocessor, before planes are cut in parts
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as the kernels below are, from here on


@triton.jit
def _place(C, L, parts, part, BLOCK_C: tl.constexpr, BACKWARDS: tl.constexpr):
    """This program's row among (image, part), its image, its channels, and its part of the plane."""
    program = tl.program_id(0)
    if BACKWARDS:  # what the pass before has read last is still in the cache
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = row % parts * part
    return row, row // parts, c, first, tl.minimum(first + part, L)


@triton.jit
def _offsets(n, c, l, C, L, stride_c, stride_l, WIDE: tl.constexpr):
    """Where the values (l, c) of image n lie; 32 bits are enough within an image, but for `WIDE` ones."""
    if WIDE:
        return n.to(tl.int64) * C * L + l.to(tl.int64)[:, None] * stride_l + c.to(tl.int64)[None, :] * stride_c
    return n.to(tl.int64) * (C * L) + (l[:, None] * stride_l + c[None, :] * stride_c)


@triton.jit
def _vector(pointer, offsets, mask, default: tl.constexpr):
    if pointer is None:
        return tl.full(offsets.shape, default, tl.float32)
    return tl.load(pointer + offsets, mask, 0.0).to(tl.float32)


@triton.jit
def _act(z, ACT: tl.constexpr):
    if ACT == "relu":
        return tl.where(z < 0, 0.0, z)  # NaN stays
    if ACT == "relu6":
        return tl.where(z < 0, 0.0, tl.where(z > 6, 6.0, z))
    if ACT == "hard_swish":
        gate = z / 6 + 0.5
        return z * tl.where(gate < 0, 0.0, tl.where(gate > 1, 1.0, gate))
    if ACT == "silu":
        return z * tl.sigmoid(z)
    return z


@triton.jit
def _act_grad(g, z, ACT: tl.constexpr):
    """`g` through the activation at its input `z`, which for relu and relu6 may be its result as well."""
    if ACT == "relu":
        return tl.where(z <= 0, 0.0, g)
    if ACT == "relu6":
        return tl.where((z <= 0) | (z >= 6), 0.0, g)
    if ACT == "hard_swish":
        return tl.where(z <= -3, 0.0, tl.where(z >= 3, g, g * (z / 3 + 0.5)))
    if ACT == "silu":
        s = tl.sigmoid(z)
        return g * s * (1 + z * (1 - s))
    return g


@triton.jit
def _statistics_kernel(
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (N, parts, C)
    square_ptr,  # (N, parts, C), or None for the means alone: sums of squared deviations from them
    C, L, parts, part, stride_c, stride_l,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, n, c, first, last = _place(C, L, parts, part, BLOCK_C, False)
    # sums are those of deviations from the first tile's mean, because squares of the values would cancel
    l = first + tl.arange(0, BLOCK_L)
    mask = (l < last)[:, None] & (c < C)[None, :]
    x = tl.load(x_ptr + _offsets(n, c, l, C, L, stride_c, stride_l, WIDE), mask, 0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(last - first, BLOCK_L)
    sums = tl.where(mask, x - shift[None, :], 0.0)
    squares = sums * sums
    for start in range(first + BLOCK_L, last, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        mask = (l < last)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + _offsets(n, c, l, C, L, stride_c, stride_l, WIDE), mask, 0.0).to(tl.float32)
        d = tl.where(mask, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 0)
    offsets = row.to(tl.int64) * C + c
    tl.store(mean_ptr + offsets, shift + total / (last - first), c < C)
    if square_ptr is not None:
        tl.store(square_ptr + offsets, tl.sum(squares, 0) - total * total / (last - first), c < C)


@triton.jit
def _merge_statistics_kernel(
    mean_ptr, square_ptr,  # (N, parts, C)
    mean_NC_ptr,  # (N, C)
    mean_C_ptr, var_ptr,  # (C,)
    N, C, L, parts, part,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        mask = (n < N)[:, None] & (c < C)[None, :]
        mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for i in range(0, parts):
            share = (tl.minimum(part, L - i * part)).to(tl.float32) / L
            offsets = (n.to(tl.int64) * parts + i)[:, None] * C + c[None, :]
            mean += tl.load(mean_ptr + offsets, mask, 0.0) * share
        tl.store(mean_NC_ptr + n.to(tl.int64)[:, None] * C + c[None, :], mean, mask)
        sums += mean
    if square_ptr is not None:
        mean_C = tl.sum(sums, 0) / N
        squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, N, BLOCK_N):
            n = start + tl.arange(0, BLOCK_N)
            mask = (n < N)[:, None] & (c < C)[None, :]
            for i in range(0, parts):
                offsets = (n.to(tl.int64) * parts + i)[:, None] * C + c[None, :]
                d = tl.where(mask, tl.load(mean_ptr + offsets, mask, 0.0) - mean_C[None, :], 0.0)
                squares += tl.load(square_ptr + offsets, mask, 0.0) + tl.minimum(part, L - i * part) * d * d
        tl.store(mean_C_ptr + c, mean_C, c < C)
        tl.store(var_ptr + c, tl.sum(squares, 0) / N / L, c < C)


@triton.jit
def _normalize_kernel(
    x_ptr, residual_ptr, y_ptr,  # (N, C, H, W)
    mean_NC_ptr,  # (N, C)
    mean_ptr, var_ptr, weight_ptr, bias_ptr, gate_weight_ptr, gate_bias_ptr,  # (C,)
    gate_NC_ptr,  # (N, C)
    C, L, parts, part, stride_c, stride_l, eps,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, n, c, first, last = _place(C, L, parts, part, BLOCK_C, True)
    NC = n.to(tl.int64) * C + c
    z = tl.load(gate_weight_ptr + c, c < C, 0.0).to(tl.float32) * tl.load(mean_NC_ptr + NC, c < C, 0.0)
    gate = tl.sigmoid(z + tl.load(gate_bias_ptr + c, c < C, 0.0).to(tl.float32))
    if first == 0:
        tl.store(gate_NC_ptr + NC, gate, c < C)
    mean = tl.load(mean_ptr + c, c < C, 0.0)
    scale = gate * tl.rsqrt(tl.load(var_ptr + c, c < C, 1.0) + eps) * _vector(weight_ptr, c, c < C, 1.0)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    for start in range(first, last, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        mask = (l < last)[:, None] & (c < C)[None, :]
        offsets = _offsets(n, c, l, C, L, stride_c, stride_l, WIDE)
        x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
        tl.store(y_ptr + offsets, _act(y, ACT), mask)


@triton.jit
def _reduce_kernel(
    g_ptr, x_ptr,  # (N, C, H, W)
    result_ptr, residual_ptr,  # (N, C, H, W) or None: to know the activation's input, which `_act_grad` needs
    dresidual_ptr,  # (N, C, H, W) or None: the gradient of the activation's input
    gate_NC_ptr,  # (N, C)
    mean_ptr, var_ptr, weight_ptr, bias_ptr,  # (C,)
    P_ptr, Q_ptr,  # (N, parts, C): sums of the gradient, and of the gradient times the centred input
    C, L, parts, part, stride_c, stride_l, eps,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, n, c, first, last = _place(C, L, parts, part, BLOCK_C, False)
    mean = tl.load(mean_ptr + c, c < C, 0.0)
    scale = tl.load(gate_NC_ptr + n.to(tl.int64) * C + c, c < C, 0.0)
    scale *= tl.rsqrt(tl.load(var_ptr + c, c < C, 1.0) + eps) * _vector(weight_ptr, c, c < C, 1.0)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    P = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    Q = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        mask = (l < last)[:, None] & (c < C)[None, :]
        offsets = _offsets(n, c, l, C, L, stride_c, stride_l, WIDE)
        g = tl.load(g_ptr + offsets, mask, 0.0).to(tl.float32)
        d = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32) - mean[None, :]
        if ACT != "":
            if result_ptr is not None:
                z = tl.load(result_ptr + offsets, mask, 0.0).to(tl.float32)
            else:
                z = d * scale[None, :] + bias[None, :]
                if residual_ptr is not None:
                    z += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
            g = _act_grad(g, z, ACT)
            if dresidual_ptr is not None:
                g = g.to(dresidual_ptr.dtype.element_ty)
                tl.store(dresidual_ptr + offsets, g, mask)
                g = g.to(tl.float32)  # as the next pass reads it
        P += g
        Q += tl.where(mask, g * d, 0.0)
    offsets = row.to(tl.int64) * C + c
    tl.store(P_ptr + offsets, tl.sum(P, 0), c < C)
    tl.store(Q_ptr + offsets, tl.sum(Q, 0), c < C)


@triton.jit
def _merge_gradients_kernel(
    P_ptr, Q_ptr,  # (N, parts, C)
    mean_NC_ptr, gate_NC_ptr, dz_NC_ptr,  # (N, C)
    var_ptr, weight_ptr,  # (C,)
    grads_ptr,  # (4, C): of weight, bias, gate_weight and gate_bias
    sums_ptr,  # (2, C)
    N, C, parts, eps,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    inv = tl.rsqrt(tl.load(var_ptr + c, c < C, 1.0) + eps)
    weight = _vector(weight_ptr, c, c < C, 1.0)
    dweight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dbias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dgate_weight = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    dgate_bias = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    gated = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mask = (n < N)[:, None] & (c < C)[None, :]
        P = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        Q = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for i in range(0, parts):
            offsets = (n * parts + i)[:, None] * C + c[None, :]
            P += tl.load(P_ptr + offsets, mask, 0.0)
            Q += tl.load(Q_ptr + offsets, mask, 0.0)
        NC = n[:, None] * C + c[None, :]
        gate = tl.load(gate_NC_ptr + NC, mask, 0.0)
        Q *= gate * inv[None, :]
        dz = Q * (1 - gate) * weight[None, :]
        tl.store(dz_NC_ptr + NC, dz, mask)
        dweight += Q
        dbias += P
        dgate_weight += dz * tl.load(mean_NC_ptr + NC, mask, 0.0)
        dgate_bias += dz
        gated += gate * P
    dweight_C = tl.sum(dweight, 0)
    tl.store(grads_ptr + c, dweight_C, c < C)
    tl.store(grads_ptr + C + c, tl.sum(dbias, 0), c < C)
    tl.store(grads_ptr + 2 * C + c, tl.sum(dgate_weight, 0), c < C)
    tl.store(grads_ptr + 3 * C + c, tl.sum(dgate_bias, 0), c < C)
    tl.store(sums_ptr + c, tl.sum(gated, 0) * inv * weight, c < C)
    tl.store(sums_ptr + C + c, dweight_C * inv * weight, c < C)


@triton.jit
def _grad_input_kernel(
    g_ptr, x_ptr, dx_ptr,  # (N, C, H, W)
    gate_NC_ptr, dz_NC_ptr,  # (N, C)
    mean_ptr, var_ptr, weight_ptr, bias_ptr, gate_weight_ptr,  # (C,)
    sums_ptr,  # (2, C), or None where mean and variance are constants
    C, L, parts, part, stride_c, stride_l, eps, count,
    ACT: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    row, n, c, first, last = _place(C, L, parts, part, BLOCK_C, True)
    NC = n.to(tl.int64) * C + c
    mean = tl.load(mean_ptr + c, c < C, 0.0)
    inv = tl.rsqrt(tl.load(var_ptr + c, c < C, 1.0) + eps)
    scale = tl.load(gate_NC_ptr + NC, c < C, 0.0) * inv * _vector(weight_ptr, c, c < C, 1.0)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    shift = tl.load(dz_NC_ptr + NC, c < C, 0.0) * tl.load(gate_weight_ptr + c, c < C, 0.0).to(tl.float32) / L
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if sums_ptr is not None:
        shift -= tl.load(sums_ptr + c, c < C, 0.0) / count
        slope += tl.load(sums_ptr + C + c, c < C, 0.0) / count * inv
    for start in range(first, last, BLOCK_L):
        l = start + tl.arange(0, BLOCK_L)
        mask = (l < last)[:, None] & (c < C)[None, :]
        offsets = _offsets(n, c, l, C, L, stride_c, stride_l, WIDE)
        g = tl.load(g_ptr + offsets, mask, 0.0).to(tl.float32)
        dx = shift[None, :]
        if (sums_ptr is not None) or ACT != "":
            d = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32) - mean[None, :]
            dx -= d * slope[None, :]
            if ACT != "":
                g = _act_grad(g, d * scale[None, :] + bias[None, :], ACT)
        tl.store(dx_ptr + offsets, dx + g * scale[None, :], mask)


@dataclass(frozen=True)
class _Grid:
    """How the programs of a pass over (N, C, H, W) share it."""

    programs: int
    shape: tuple[int, ...]  # C, H * W, parts of a plane, values in a part, strides of channel and pixel
    blocks: dict[str, int | bool]

    @property
    def parts(self) -> int:
        return self.shape[2]


def _grid(x: Tensor) -> _Grid:
    n, c, h, w = x.shape
    size = h * w
    if _is_channels_last(x):
        # whole lines of memory, but few idle lanes
        block_c = min((128, 64, 32), key=lambda block: (triton.cdiv(c, block) * block, -block))
        block_c = min(block_c, triton.next_power_of_2(c))
        block_l = min(_TILE // block_c, triton.next_power_of_2(size))
        strides = 1, c
    else:
        block_l = min(1024, triton.next_power_of_2(size))
        block_c = min(_TILE // block_l, triton.next_power_of_2(c))
        strides = size, 1
    rows = n * triton.cdiv(c, block_c)
    wanted = _PROGRAMS * torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 16
    # a part of less than two tiles would cost more than it shares out
    parts = max(1, min(wanted // rows, triton.cdiv(size, 2 * block_l)))
    part = triton.cdiv(triton.cdiv(size, parts), block_l) * block_l
    parts = triton.cdiv(size, part)
    blocks = dict(BLOCK_C=block_c, BLOCK_L=block_l, WIDE=c * size >= 2**31)
    return _Grid(rows * parts, (c, size, parts, part, *strides), blocks)


def _is_channels_last(x: Tensor) -> bool:
    return x.shape[1] > 1 and x.is_contiguous(memory_format=torch.channels_last)


def supports(x: Tensor) -> bool:
    """Whether these passes can take `x`."""
    dense = x.is_contiguous() or _is_channels_last(x)
    on_device = x.is_cuda or (x.is_cpu and _INTERPRETED)
    plain = torch.compiler.is_compiling() or not x.is_neg()  # which a compiler can't ask
    dtypes = torch.float32, torch.bfloat16, torch.float16
    return on_device and dense and plain and x.numel() > 0 and x.dtype in dtypes


def _launch(x: Tensor, kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Starts a kernel on the device of `x`, where Triton would take the current one."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        with torch.cuda.device(x.device):
            kernel[(programs,)](*args, **constants)
    else:
        kernel[(programs,)](*args, **constants)


def _merge_blocks(n: int, c: int) -> dict[str, int]:
    """Few channels in a program of the merging kernels, because its time is what all others wait for."""
    return dict(BLOCK_N=min(256, triton.next_power_of_2(n)), BLOCK_C=min(8, triton.next_power_of_2(c)))


def like(t: Tensor, x: Tensor) -> Tensor:
    """`t` in the layout of `x`."""
    if t.stride() == x.stride() and not t.is_neg():
        return t
    return torch.empty_like(x, dtype=t.dtype).copy_(t)


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
    _launch(x, _statistics_kernel, grid.programs, x, means, squares, *grid.shape, **grid.blocks)
    mean_NC = means.view(n, c) if grid.parts == 1 else means.new_empty(n, c)
    if batch or grid.parts > 1:
        blocks = _merge_blocks(n, c)
        programs = triton.cdiv(c, blocks["BLOCK_C"])
        _launch(x, _merge_statistics_kernel, programs, means, squares, mean_NC, mean, var, n, *grid.shape[:4], **blocks)
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
    residual: Tensor | None = None,
    act: str = "",
) -> tuple[Tensor, Tensor]:
    grid = _grid(x)
    y, gate_NC = torch.empty_like(x), torch.empty_like(mean_NC)
    residual = None if residual is None else like(residual, x)
    vectors = map(_dense, (mean, var, weight, bias, gate_weight, gate_bias))
    tensors = x, residual, y, mean_NC, *vectors, gate_NC
    _launch(x, _normalize_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
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
    _launch(x, _reduce_kernel, grid.programs, *tensors, *grid.shape, eps, ACT=act, **grid.blocks)
    dz_NC, grads, sums = torch.empty_like(gate_NC), mean.new_empty(4, c), mean.new_empty(2, c)
    blocks = _merge_blocks(n, c)
    tensors = P, Q, mean_NC, gate_NC, dz_NC, var, weight, grads, sums
    programs = triton.cdiv(c, blocks["BLOCK_C"])
    _launch(x, _merge_gradients_kernel, programs, *tensors, n, c, grid.parts, eps, **blocks)
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
    tensors = g, x, dx, *vectors, sums if count else None
    _launch(x, _grad_input_kernel, grid.programs, *tensors, *grid.shape, eps, float(count), ACT=act, **grid.blocks)
    return dx
