"""What a convolution does with a tile of its sums: whose they are, which correction is theirs, how they become the result."""

from __future__ import annotations

import triton
import triton.language as tl

from qpass_kernels.blocks import finish, halved, scaled


@triton.jit
def state(first, size, dilation, TAPS: tl.constexpr):
    """The state of the taps first, first + dilation, ... that lie in 0 .. size - 1 (conv_weights.ranges)."""
    low = tl.minimum((tl.maximum(-first, 0) + dilation - 1) // dilation, TAPS)
    high = tl.minimum((tl.maximum(size - first, 0) + dilation - 1) // dilation, TAPS)
    return tl.where(high > low, low * TAPS - low * (low - 1) // 2 + high - low, 0)


@triton.jit
def outputs(first, group, N, GROUPS: tl.constexpr, BN: tl.constexpr):
    """The numbers of BN outputs from `first` of a group on, N past its last."""
    rn = first + tl.arange(0, BN)
    if GROUPS > 1:
        rn = tl.where(rn < N // GROUPS, group * (N // GROUPS) + rn, N)
    return rn


@triton.jit
def settle(
    acc, y, other, rm, rn, M, N, correction, edge, alpha, beta, slope, sample, sample_scale, sample_zero,
    other_scale, other_zero, inverse, zero, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Writes a tile of sums [BM, BN], pixels by channels: `finish` behind a correction, residual codes and slopes.

    edge: [BM], the row of the correction for each pixel; sample: [BM], its image, of which there is one.
    """
    if correction is not None:
        more = tl.load(correction + edge[:, None] * N + rn[None, :], mask=(rn < N)[None, :], other=0)
        if sample_zero is not None:
            more *= tl.load(sample_zero + sample)[:, None]
        acc -= more
    value = scaled(acc, rn, sample, M, N, alpha, beta, None, sample_scale, None, False)
    if other is not None:
        inside = (rm < M)[:, None] & (rn < N)[None, :]
        more = tl.load(other + rm.to(tl.int64)[:, None] * N + rn[None, :], mask=inside, other=0).to(tl.float32)
        if other.dtype.element_ty == tl.int8:
            value += (more - other_zero) * other_scale
        else:
            value += more
    if slope is not None:
        bound = tl.load(slope + rn, mask=rn < N, other=0.0)[None, :]
        low = value * bound if ACT == "prelu" else 0.0
        value = tl.where(value > 0, value, low)
        if ACT == "cap":
            value = tl.minimum(value, bound)
    finish(value, y, None, rn, rm, M, N, None, None, None, None, None, inverse, zero, ACT, CODES, False)


@triton.jit
def parted(tile):
    """The columns of a tile in parts of at most 32: the epilogue of more would not fit the registers."""
    COLUMNS: tl.constexpr = tile.shape[1]
    if COLUMNS <= 32:
        parts = (tile,)
    elif COLUMNS == 64:
        parts = halved(tile)
    else:
        left, right = halved(tile)
        parts = parted(left) + parted(right)
    return parts
