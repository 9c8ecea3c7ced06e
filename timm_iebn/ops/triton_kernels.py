"""IEBN's kernels in Triton, which `triton` launches.

Each program of a pass takes one image, a block of channels and one of `parts` parts of its plane; what the programs
find is merged by a small kernel, in a fixed order, so that results repeat bit for bit.

Two tensors of float32 go from kernel to kernel, because each argument of a launch costs the host time. `saved`,
(2 N + 2, C): instance means, gates, and mean and variance of the batch. `found`, (6, C): the gradients of weight, bias,
gate_weight and gate_bias, and the two sums through which mean and variance reach the input's. The gradients of what is
under the sigmoids, `dz`, (N, C), are apart from it, because those of the parameters stay when backward is done.
"""

import triton
import triton.language as tl


@triton.jit
def _place(
    C, L, parts, part, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr, BLOCK_C: tl.constexpr, BACKWARDS: tl.constexpr
):
    """N, C and L; this program's row among (image, part), its image, its channels, and its part of the plane."""
    C = C // ALIGN_C * ALIGN_C  # the same, so that the compiler knows what divides it: vectors of loads and stores
    L = L // ALIGN_L * ALIGN_L
    program = tl.program_id(0)
    if BACKWARDS:  # what the pass before has read last is still in the cache
        program = tl.num_programs(0) - 1 - program
    blocks = tl.cdiv(C, BLOCK_C)
    row = program // blocks
    c = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    first = row % parts * part
    N = (tl.num_programs(0) // (blocks * parts)).to(tl.int64)
    return N, C, L, row, row // parts, c, first, tl.minimum(first + part, L)


@triton.jit
def _tile(n, c, start, last, C, L, CHANNELS_LAST: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr):
    """Where the values (pixel, channel) of image n lie from pixel `start` on, and which of them are within the part.

    32 bits are enough within an image, but for `WIDE` ones.
    """
    l = start + tl.arange(0, BLOCK_L)
    mask = (l < last)[:, None] & (c < C)[None, :]
    if WIDE:
        c = c.to(tl.int64)
        l = l.to(tl.int64)
    if CHANNELS_LAST:
        offsets = l[:, None] * C + c[None, :]
    else:
        offsets = l[:, None] + c[None, :] * L
    return n.to(tl.int64) * C * L + offsets, mask


@triton.jit
def _parts(n, first, c, N, C, stride, parts, BLOCK_P: tl.constexpr):
    """Parts from `first` on, and where what was found of them, (N, parts, stride), lies for images n and channels c."""
    i = first + tl.arange(0, BLOCK_P)
    offsets = (n[:, None] * parts + i[None, :])[:, :, None] * stride + c[None, None, :]
    mask = ((n < N)[:, None] & (i < parts)[None, :])[:, :, None] & (c < C)[None, None, :]
    return i, offsets, mask


@triton.jit
def _vector(pointer, offsets, mask, default: tl.constexpr):
    if pointer is None:
        values = tl.full(offsets.shape, default, tl.float32)
    else:  # not after an early return, which does not keep the compiler from what follows
        values = tl.load(pointer + offsets, mask, 0.0).to(tl.float32)
    return values


@triton.jit
def _batch(saved_ptr, N, c, C, eps):
    """Mean and reciprocal standard deviation of the channels, from what was saved."""
    mean_ptr = saved_ptr + 2 * N * C
    return tl.load(mean_ptr + c, c < C, 0.0), tl.rsqrt(tl.load(mean_ptr + C + c, c < C, 1.0) + eps)


@triton.jit
def _scale(gate, inv, c, C, weight_ptr):
    """By what the centred input is multiplied; one order of the factors, so that all passes find the same bits."""
    return gate * inv * _vector(weight_ptr, c, c < C, 1.0)


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
def statistics_kernel(
    x_ptr,  # (N, C, H, W)
    mean_ptr,  # (N, parts, C)
    square_ptr,  # (N, parts, C), or None for the means alone: sums of squared deviations from them
    running_mean_ptr, running_var_ptr,  # (C,), which are to be saved as mean and variance, or None
    saved_ptr,  # (2 N + 2, C)
    C, L, parts, part,
    CHANNELS_LAST: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N, C, L, row, n, c, first, last = _place(C, L, parts, part, ALIGN_C, ALIGN_L, BLOCK_C, False)
    if running_mean_ptr is not None:
        if row == 0:
            mean_C_ptr = saved_ptr + 2 * N * C + c
            tl.store(mean_C_ptr, tl.load(running_mean_ptr + c, c < C, 0.0).to(tl.float32), c < C)
            tl.store(mean_C_ptr + C, tl.load(running_var_ptr + c, c < C, 0.0).to(tl.float32), c < C)
    # sums are those of deviations from the first tile's mean, because squares of the values would cancel
    offsets, mask = _tile(n, c, first, last, C, L, CHANNELS_LAST, BLOCK_L, WIDE)
    x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
    shift = tl.sum(x, 0) / tl.minimum(last - first, BLOCK_L)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)  # an infinity less itself would be no number
    sums = tl.where(mask, x - shift[None, :], 0.0)
    squares = sums * sums
    for start in range(first + BLOCK_L, last, BLOCK_L):
        offsets, mask = _tile(n, c, start, last, C, L, CHANNELS_LAST, BLOCK_L, WIDE)
        x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
        d = tl.where(mask, x - shift[None, :], 0.0)
        sums += d
        squares += d * d
    total = tl.sum(sums, 0)
    offsets = row.to(tl.int64) * C + c
    tl.store(mean_ptr + offsets, shift + total / (last - first), c < C)
    if square_ptr is not None:
        tl.store(square_ptr + offsets, tl.sum(squares, 0) - total * total / (last - first), c < C)


@triton.jit
def _follow(pointers, values, momentum, mask):
    """Gives `values` the share `momentum` in a running statistic, in float32 or wider; a share of 1 leaves no trace of
    what was, however large.
    """
    old = tl.load(pointers, mask, 0.0)
    if old.dtype != tl.float64:
        old = old.to(tl.float32)
    tl.store(pointers, old * (1 - momentum) + values * momentum, mask)


@triton.jit(do_not_specialize=["N", "parts"])  # which change with the batch
def merge_statistics_kernel(
    mean_ptr, square_ptr,  # (N, parts, C); squares may be None
    running_mean_ptr, running_var_ptr,  # (C,), which follow the batch, or None
    saved_ptr,  # (2 N + 2, C)
    N, C, L, parts, part, momentum,
    ALIGN_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = C // ALIGN_C * ALIGN_C
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
        mean = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for first in range(0, parts, BLOCK_P):
            i, offsets, found = _parts(n, first, c, N, C, C, parts, BLOCK_P)
            share = tl.minimum(part, L - i * part).to(tl.float32) / L
            mean += tl.sum(tl.load(mean_ptr + offsets, found, 0.0) * share[None, :, None], 1)
        # with one part, these are the means that lie there already
        tl.store(saved_ptr + n[:, None] * C + c[None, :], mean, ((n < N) & (parts > 1))[:, None] & (c < C)[None, :])
        sums += mean
    if square_ptr is not None:
        mean_C = tl.sum(sums, 0) / N
        squares = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
        for start in range(0, N, BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            for first in range(0, parts, BLOCK_P):
                i, offsets, found = _parts(n, first, c, N, C, C, parts, BLOCK_P)
                size = tl.minimum(part, L - i * part).to(tl.float32)
                d = tl.where(found, tl.load(mean_ptr + offsets, found, 0.0) - mean_C[None, None, :], 0.0)
                d *= d * size[None, :, None]
                squares += tl.sum(tl.load(square_ptr + offsets, found, 0.0) + d, 1)
        squares_C = tl.sum(squares, 0)
        mean_C_ptr = saved_ptr + 2 * N.to(tl.int64) * C + c
        tl.store(mean_C_ptr, mean_C, c < C)
        tl.store(mean_C_ptr + C, squares_C / N / L, c < C)
        if running_mean_ptr is not None:
            count = N.to(tl.float32) * L
            _follow(running_mean_ptr + c, mean_C, momentum, c < C)
            _follow(running_var_ptr + c, squares_C / (count - 1), momentum, c < C)


@triton.jit
def normalize_kernel(
    x_ptr, residual_ptr, y_ptr,  # (N, C, H, W)
    saved_ptr,  # (2 N + 2, C), of which the gates are filled in
    weight_ptr, bias_ptr, gate_weight_ptr, gate_bias_ptr,  # (C,)
    C, L, parts, part, eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N, C, L, row, n, c, first, last = _place(C, L, parts, part, ALIGN_C, ALIGN_L, BLOCK_C, True)
    NC = n.to(tl.int64) * C + c
    z = tl.load(gate_weight_ptr + c, c < C, 0.0).to(tl.float32) * tl.load(saved_ptr + NC, c < C, 0.0)
    gate = tl.sigmoid(z + tl.load(gate_bias_ptr + c, c < C, 0.0).to(tl.float32))
    if first == 0:
        tl.store(saved_ptr + N * C + NC, gate, c < C)
    mean, inv = _batch(saved_ptr, N, c, C, eps)
    scale = _scale(gate, inv, c, C, weight_ptr)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    for start in range(first, last, BLOCK_L):
        offsets, mask = _tile(n, c, start, last, C, L, CHANNELS_LAST, BLOCK_L, WIDE)
        x = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32)
        y = (x - mean[None, :]) * scale[None, :] + bias[None, :]
        if residual_ptr is not None:
            y += tl.load(residual_ptr + offsets, mask, 0.0).to(tl.float32)
        tl.store(y_ptr + offsets, _act(y, ACT), mask)


@triton.jit
def reduce_kernel(
    g_ptr, x_ptr,  # (N, C, H, W)
    result_ptr, residual_ptr,  # (N, C, H, W) or None: to know the activation's input, which `_act_grad` needs
    dresidual_ptr,  # (N, C, H, W) or None: the gradient of the activation's input
    saved_ptr,  # (2 N + 2, C)
    weight_ptr, bias_ptr,  # (C,)
    sums_ptr,  # (N, parts, 2, C): of the gradient, and of the gradient times the centred input
    C, L, parts, part, eps,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N, C, L, row, n, c, first, last = _place(C, L, parts, part, ALIGN_C, ALIGN_L, BLOCK_C, False)
    mean, inv = _batch(saved_ptr, N, c, C, eps)
    scale = _scale(tl.load(saved_ptr + (N + n) * C + c, c < C, 0.0), inv, c, C, weight_ptr)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    P = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    Q = tl.zeros((BLOCK_L, BLOCK_C), tl.float32)
    for start in range(first, last, BLOCK_L):
        offsets, mask = _tile(n, c, start, last, C, L, CHANNELS_LAST, BLOCK_L, WIDE)
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
    sums_ptr += row.to(tl.int64) * 2 * C + c
    tl.store(sums_ptr, tl.sum(P, 0), c < C)
    tl.store(sums_ptr + C, tl.sum(Q, 0), c < C)


@triton.jit(do_not_specialize=["N", "parts"])  # which change with the batch
def merge_gradients_kernel(
    sums_ptr,  # (N, parts, 2, C)
    saved_ptr,  # (2 N + 2, C)
    weight_ptr,  # (C,)
    found_ptr,  # (6, C)
    dz_ptr,  # (N, C)
    N, C, parts, eps,
    ALIGN_C: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    C = C // ALIGN_C * ALIGN_C
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    wide_N = N.to(tl.int64)
    mean_C, inv = _batch(saved_ptr, wide_N, c, C, eps)
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
        for first in range(0, parts, BLOCK_P):
            _, offsets, found = _parts(n, first, c, N, C, 2 * C, parts, BLOCK_P)
            P += tl.sum(tl.load(sums_ptr + offsets, found, 0.0), 1)
            Q += tl.sum(tl.load(sums_ptr + offsets + C, found, 0.0), 1)
        NC = n[:, None] * C + c[None, :]
        gate = tl.load(saved_ptr + wide_N * C + NC, mask, 0.0)
        Q *= gate * inv[None, :]
        dweight += Q
        dbias += P
        gated += gate * P
        dz = Q * (1 - gate) * weight[None, :]
        tl.store(dz_ptr + NC, dz, mask)
        dgate_bias += dz
        dgate_weight += dz * tl.load(saved_ptr + NC, mask, 0.0)
    dweight_C = tl.sum(dweight, 0)
    tl.store(found_ptr + c, dweight_C, c < C)
    tl.store(found_ptr + C + c, tl.sum(dbias, 0), c < C)
    tl.store(found_ptr + 2 * C + c, tl.sum(dgate_weight, 0), c < C)
    tl.store(found_ptr + 3 * C + c, tl.sum(dgate_bias, 0), c < C)
    tl.store(found_ptr + 4 * C + c, tl.sum(gated, 0) * inv * weight, c < C)
    tl.store(found_ptr + 5 * C + c, dweight_C * inv * weight, c < C)


@triton.jit
def grad_input_kernel(
    g_ptr, x_ptr, dx_ptr,  # (N, C, H, W)
    saved_ptr,  # (2 N + 2, C)
    found_ptr,  # (6, C)
    dz_ptr,  # (N, C)
    weight_ptr, bias_ptr, gate_weight_ptr,  # (C,)
    C, L, parts, part, eps, count,
    BATCH: tl.constexpr,  # False where mean and variance are constants
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, ALIGN_C: tl.constexpr, ALIGN_L: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_L: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    N, C, L, row, n, c, first, last = _place(C, L, parts, part, ALIGN_C, ALIGN_L, BLOCK_C, True)
    NC = n.to(tl.int64) * C + c
    mean, inv = _batch(saved_ptr, N, c, C, eps)
    scale = _scale(tl.load(saved_ptr + N * C + NC, c < C, 0.0), inv, c, C, weight_ptr)
    bias = _vector(bias_ptr, c, c < C, 0.0)
    shift = tl.load(dz_ptr + NC, c < C, 0.0) / L
    shift *= tl.load(gate_weight_ptr + c, c < C, 0.0).to(tl.float32)
    slope = tl.zeros((BLOCK_C,), tl.float32)
    if BATCH:
        shift -= tl.load(found_ptr + 4 * C + c, c < C, 0.0) / count
        slope += tl.load(found_ptr + 5 * C + c, c < C, 0.0) / count * inv
    for start in range(first, last, BLOCK_L):
        offsets, mask = _tile(n, c, start, last, C, L, CHANNELS_LAST, BLOCK_L, WIDE)
        g = tl.load(g_ptr + offsets, mask, 0.0).to(tl.float32)
        dx = shift[None, :]
        if BATCH or ACT != "":
            d = tl.load(x_ptr + offsets, mask, 0.0).to(tl.float32) - mean[None, :]
            dx -= d * slope[None, :]
            if ACT != "":
                g = _act_grad(g, d * scale[None, :] + bias[None, :], ACT)
        tl.store(dx_ptr + offsets, dx + g * scale[None, :], mask)
