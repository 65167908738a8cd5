"""What the matmul kernels share: how a sum is split over K and put together, and what happens to it then.

    split   `SPLIT` programs sum a slice of K each and leave it in `partial`; the last to arrive adds the slices in their
            order, so that the result does not depend on who came last
    finish  y = act((acc - offset[n] * row_zero[m]) * alpha[n] * row_scale[m] + beta[n] + other[m, n]), and codes of it
            where the output is quantized: clamp(round(y * inverse) + zero, -128, 127)

An alpha, beta, offset, row_scale, row_zero or other that is None is left out. `acc` is [BN, BM] (weights on the left) where
TURNED, else [BM, BN]; y and other are [M, N], contiguous.
"""

import triton
import triton.language as tl

from qpass_kernels.activations import activate

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to an integer, half to even


@triton.jit
def round_even(y):
    """Y rounded to the nearest integer, half to even; |y| is at most 2^22."""
    return (y + ROUND) - ROUND


@triton.jit
def codes(y, inverse, zero):
    """int8 codes of y under one scale: clamp(round(y / scale) + zero, -128, 127)."""
    q = round_even(tl.clamp(y * inverse, -1024.0, 1024.0)) + zero
    return tl.clamp(q, -128.0, 127.0).to(tl.int8)


@triton.jit
def rounded(y, DTYPE: tl.constexpr):
    """Float32 y as DTYPE holds it, in float32. Triton's interpreter cuts bfloat16 off instead of rounding."""
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = y.to(tl.uint32, bitcast=True)
        near = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        y = tl.where(y == y, near.to(tl.float32, bitcast=True), y)
    return y.to(DTYPE).to(tl.float32)


@triton.jit
def e4m3(y):
    """float8_e4m3fn of a float32 y, clamped to +-448, half to even.

    Triton's interpreter drops the carry of a mantissa that is rounded up to the next power of two, and NaN. So it is given
    values that need no rounding: 1.5 * 2^(exponent + 20) has steps as wide as those of e4m3 at y.
    """
    y = tl.clamp(y, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
    known = y == y
    if INTERPRETED:
        exponent = tl.maximum((y.to(tl.int32, bitcast=True) >> 23) & 255, 121)
        wide = ((exponent + 20) << 23).to(tl.float32, bitcast=True) * 1.5
        y = (y + wide) - wide
    code = y.to(tl.float8e4nv)
    if INTERPRETED:
        code = tl.where(known, code.to(tl.int8, bitcast=True), 127).to(tl.float8e4nv, bitcast=True)
    return code


@triton.jit
def part_of(total, part, SPLIT: tl.constexpr):
    """(first, past the last) of the blocks that one of SPLIT programs works on."""
    each = tl.cdiv(total, SPLIT)
    first = tl.minimum(part * each, total)
    return first, tl.minimum(first + each, total)


@triton.jit
def arrive(acc, partial, counters, tile, part, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr):
    """Leaves a slice's sum [ROWS, COLS] for the others; returns whether this program is the last of its tile."""
    inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    tl.store(partial + (tile.to(tl.int64) * SPLIT + part) * (ROWS * COLS) + inside, acc)
    tl.debug_barrier()  # every thread's part is written before the one that counts releases it
    return tl.atomic_add(counters + tile, 1, sem="acq_rel", scope="gpu") == SPLIT - 1


@triton.jit
def gathered(partial, counters, tile, ROWS: tl.constexpr, COLS: tl.constexpr, SPLIT: tl.constexpr, DTYPE: tl.constexpr):
    """The sum over the slices of a tile, in their order; the counter is left at 0 for the next launch."""
    inside = tl.arange(0, ROWS)[:, None] * COLS + tl.arange(0, COLS)[None, :]
    base = partial + tile.to(tl.int64) * SPLIT * (ROWS * COLS)
    acc = tl.zeros((ROWS, COLS), dtype=DTYPE)
    for s in range(SPLIT):
        acc += tl.load(base + s * (ROWS * COLS) + inside, cache_modifier=".cg")
    tl.store(counters + tile, 0)
    return acc


@triton.jit
def halved(tile):
    """The left and the right half of a tile's columns."""
    rows: tl.constexpr = tile.shape[0]
    columns: tl.constexpr = tile.shape[1]
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit
def along_n(values, TURNED: tl.constexpr):
    """[BN] as a factor of a tile."""
    return values[:, None] if TURNED else values[None, :]


@triton.jit
def along_m(values, TURNED: tl.constexpr):
    """[BM] as a factor of a tile."""
    return values[None, :] if TURNED else values[:, None]


@triton.jit
def scaled(acc, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, TURNED: tl.constexpr):
    """(acc - offset * row_zero) * alpha * row_scale + beta in float32."""
    in_n = rn < N
    in_m = rm < M
    if offset is not None:
        column = along_n(tl.load(offset + rn, mask=in_n, other=0), TURNED)
        if row_zero is not None:
            column = column * along_m(tl.load(row_zero + rm, mask=in_m, other=0), TURNED)
        acc = acc - column
    y = acc.to(tl.float32)
    if alpha is not None:
        y = y * along_n(tl.load(alpha + rn, mask=in_n, other=0.0), TURNED)
    if row_scale is not None:
        y = y * along_m(tl.load(row_scale + rm, mask=in_m, other=0.0), TURNED)
    if beta is not None:
        y = y + along_n(tl.load(beta + rn, mask=in_n, other=0.0), TURNED)
    return y


@triton.jit
def finish(
    acc, y_ptr, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero,
    ACT: tl.constexpr, CODES: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """Writes a tile of sums as the op's output."""
    y = scaled(acc, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, TURNED)
    where = along_m(rm.to(tl.int64) * N, TURNED) + along_n(rn, TURNED)
    inside = along_m(rm < M, TURNED) & along_n(rn < N, TURNED)
    if other is not None:
        y = y + tl.load(other + where, mask=inside, other=0.0).to(tl.float32)
    y = activate(y, ACT)
    if CODES:
        tl.store(y_ptr + where, codes(y, inverse, zero), mask=inside)
    elif y_ptr.dtype.element_ty == tl.float8e4nv:
        tl.store(y_ptr + where, e4m3(y * inverse), mask=inside)
    else:
        tl.store(y_ptr + where, rounded(y, y_ptr.dtype.element_ty).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def complete(
    acc, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero, partial, counters,
    SPLIT: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """The end of a kernel whose programs are (tile of outputs, tile of tokens, slice of K): acc [BN, BM] becomes y."""
    if SPLIT == 1:
        finish(acc, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero, ACT, CODES, True)
    else:
        BN: tl.constexpr = acc.shape[0]
        BM: tl.constexpr = acc.shape[1]
        tile = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        if arrive(acc, partial, counters, tile, tl.program_id(2), BN, BM, SPLIT):
            acc = gathered(partial, counters, tile, BN, BM, SPLIT, acc.dtype)
            finish(
                acc, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero, ACT, CODES, True
            )  # fmt: skip
