"""2-d convolution of int8 or fp8 as a matmul that is never laid out: y = act((acc - correction) * alpha + beta + other).

`implicit`: BM pixels of the result on the left, BN output channels on the right, and K runs over (kh, kw, c). Where BK
divides the channels of a group, a block of K has one tap: its address is the pixel's plus a number. Else each k has its tap.
Padding is read as 0; `correction` (conv_weights.py) takes back what the zero point makes of that.

x: [B, C, H, W], stored channels last, else copied. weight: [N, KH * KW * depth(C / groups)]. other: [B, N, OH, OW], float,
or int8 codes of other_scale and other_zero. act: of activations.NAMES, or with slope [N] prelu or cap (min(relu(y), slope)).
A 1 x 1 window that visits every pixel once is w8a8.py's matmul.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels import w8a8
from qpass_kernels.blocks import arrive, gathered, part_of
from qpass_kernels.configs import Config, conv_kind
from qpass_kernels.conv_blocks import outputs, parted, settle, state
from qpass_kernels.conv_weights import (
    ARGUMENTS,
    Finish,
    Window,
    arguments,
    channels_last,
    check_image,
    depth,
    empty_image,
    exact_sums,
    padded,
    states,
)
from qpass_kernels.epilogue import check_vector
from qpass_kernels.launch import OPTIONS, Chip, cdiv, check_device, chip_of, scratch
from qpass_kernels.matmul import define
from qpass_kernels.measured import known

TILES = (  # from so many pixels and outputs of a group on: bm, bn, warps
    (2048, 193, 128, 256, 8),
    (2048, 65, 128, 128, 8),
    (2048, 33, 128, 64, 8),
    (2048, 17, 128, 32, 4),
    (2048, 0, 128, 16, 4),
    (0, 33, 64, 64, 4),
    (0, 17, 64, 32, 4),
    (0, 0, 64, 16, 4),
)


@triton.jit(do_not_specialize=["M"])
def implicit(
    x, w, y, other, correction, alpha, beta, slope, sample_scale, sample_zero, partial, counters, other_scale, other_zero,
    inverse, zero,
    M, N, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    C: tl.constexpr, GROUPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SPLIT: tl.constexpr, BAND: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One tile of BM pixels of BN channels of a group, one slice of K. C: channels of a group, a multiple of 4."""
    K: tl.constexpr = KH * KW * C
    group, part = tl.program_id(1), tl.program_id(2)
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N // GROUPS, BN)
    band = tl.program_id(0) // (BAND * tiles_n)
    height = tl.minimum(tiles_m - band * BAND, BAND)
    within = tl.program_id(0) % (BAND * tiles_n)
    rm = (band * BAND + within % height) * BM + tl.arange(0, BM)
    start = within // height * BN
    rn = outputs(start, group, N, GROUPS, BN)
    rk = tl.arange(0, BK)
    top = tl.where(rm < M, rm // OW % OH * stride_h - pad_h, H)  # past the last pixel: below the image, nothing is read
    left = rm % OW * stride_w - pad_w
    first, last = part_of(tl.cdiv(K, BK), part, SPLIT)
    at_x = x + ((rm // (OH * OW)).to(tl.int64) * H * W + top * W + left) * (GROUPS * C) + group * C
    at_w = w + tl.minimum(rn, N - 1).to(tl.int64)[None, :] * K + (first * BK + rk)[:, None]
    acc = tl.zeros((BM, BN), dtype=ACC)
    for block in range(first, last):
        if C % BK == 0:
            tap = block // (C // BK)
            down, right = tap // KW * dil_h, tap % KW * dil_w
            step = (down * W + right) * (GROUPS * C) + block % (C // BK) * BK
            row, column = top + down, left + right
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
            a = tl.load(at_x[:, None] + (step + rk)[None, :], mask=inside[:, None], other=0.0)
            b = tl.load(at_w)
        else:
            k = block * BK + rk
            tap = k // C
            down, right = tap // KW * dil_h, tap % KW * dil_w
            step = (down * W + right) * (GROUPS * C) + k % C
            row, column = top[:, None] + down[None, :], left[:, None] + right[None, :]
            inside = (row >= 0) & (row < H) & (column >= 0) & (column < W) & (k < K)[None, :]
            a = tl.load(at_x[:, None] + step[None, :], mask=inside, other=0.0)
            b = tl.load(at_w, mask=(k < K)[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
        at_w += BK
    tile = group * tl.num_programs(0) + tl.program_id(0)
    if SPLIT == 1 or arrive(acc, partial, counters, tile, part, BM, BN, SPLIT):
        if SPLIT > 1:
            acc = gathered(partial, counters, tile, BM, BN, SPLIT, ACC)
        edge = state(top, H, dil_h, KH) * (KW * (KW + 1) // 2 + 1) + state(left, W, dil_w, KW)
        sample = tl.where(rm < M, rm // (OH * OW), 0)
        parts = parted(acc)
        PARTS: tl.constexpr = len(parts)
        for i in tl.static_range(PARTS):
            some = outputs(start + i * (BN // PARTS), group, N, GROUPS, BN // PARTS)
            settle(
                parts[i], y, other, rm, some, M, N, correction, edge, alpha, beta, slope, sample, sample_scale, sample_zero,
                other_scale, other_zero, inverse, zero, ACT, CODES,
            )  # fmt: skip


def check(op: str, x: Tensor, weight: Tensor, correction: Tensor | None, window: Window, groups: int) -> None:
    """Raises ValueError unless x is an image and weight and correction are those of conv_weights.py."""
    check_image(op, x, weight, window)
    if not 1 <= groups <= x.shape[1] or x.shape[1] % groups or weight.shape[0] % groups:
        raise ValueError(f"{op}: {groups} groups do not divide {x.shape[1]} channels and {weight.shape[0]} outputs")
    (kh, kw), channels = window.kernel, x.shape[1] // groups
    if weight.shape[1] != kh * kw * depth(channels):
        raise ValueError(
            f"{op}: a packed row of {kh} x {kw} taps of {channels} channels has {kh * kw * depth(channels)} values, "
            f"not {weight.shape[1]}"
        )
    if correction is None:
        return
    count = states(kh) * states(kw)
    check_vector(op, "correction", correction, count * weight.shape[0], (torch.int32,), x.device)
    if x.dtype != torch.int8 or correction.shape[0] != count:
        raise ValueError(f"{op}: correction must have {count} rows, of int8, not {correction.shape[0]} of {x.dtype}")


@functools.lru_cache(4096)
def rule(m: int, n: int, c: int, k: int, groups: int, chip: Chip) -> Config:
    """The tiles of M pixels, and N outputs of C channels of a group, in sums of K; as wide as all processors have one."""
    enough = [wide for wide in (256, 128) if m * n * groups >= 128 * wide * chip.processors]
    widest = next((wide for wide in enough if wide < 256 or chip.capability[0] in (9, 10)), 64)
    bm, bn, warps = next(tile[2:] for tile in TILES if m >= tile[0] and n >= tile[1] and tile[3] <= widest)
    bk = next((size for size in (128, 64, 32) if c % size == 0), 64 if k > 32 else 32)
    stages = 3 if bk == 128 and bn < 256 else 4
    while stages > 2 and stages * bk * (bm + bn) > 0.9 * chip.shared:
        stages -= 1
    tiles, split = cdiv(m, bm) * cdiv(n, bn) * groups, 1
    while split < 8 and tiles * split < chip.processors and k // bk >= 8 * split:
        split *= 2
    return Config(bm=bm, bn=bn, bk=bk, split=split, warps=warps, stages=stages)


def chosen(m: int, n: int, c: int, window: Window, groups: int, chip: Chip) -> Config:
    """The configuration measured for a convolution of M pixels, N outputs and C channels of a group, or ruled."""
    k = window.kernel[0] * window.kernel[1] * c
    kind = conv_kind(window.kernel, window.stride, c, groups)
    return known(kind, m, n, k, chip) or rule(m, n, c, k, groups, chip)


def convolve(
    x: Tensor, weight: Tensor, correction: Tensor | None, window: Window, after: Finish, groups: int,
    config: Config | None = None,
) -> Tensor:  # fmt: skip
    """The launcher of `conv2d`: [B, C, H, W] -> [B, N, OH, OW]. A config given is one of `implicit`."""
    check("conv2d", x, weight, correction, window, groups)
    n, c = weight.shape[0], depth(x.shape[1] // groups)
    y = empty_image(x, n, window, after.out_dtype)
    after.check("conv2d", y)
    after.check_samples("conv2d", x, correction is not None)
    if y.numel() == 0:
        return y
    rows = padded(x, groups)
    other = None if after.other is None else channels_last(after.other)
    m = y.numel() // n
    if config is None and c == x.shape[1] and is_matmul(window, after, groups):
        epilogue = replace(after.plain(), other=other, offset=None if correction is None else correction[-1])
        w8a8.launch(rows.view(m, c), weight, y=y.permute(0, 2, 3, 1).view(m, n), epilogue=epilogue, config=None)
        return y
    config = config or chosen(m, n // groups, c, window, groups, chip_of(x.device))
    tiles = cdiv(m, config.bm) * cdiv(n // groups, config.bn)
    dtype = torch.int32 if x.dtype == torch.int8 else torch.float32
    parts = scratch(x, tiles * groups, config.split, config.bm * config.bn, dtype)
    implicit[tiles, groups, config.split](
        rows, weight, y, other, correction, *after.vectors, *parts, *after.numbers, m, n, *x.shape[2:], *y.shape[2:],
        *window.stride, *window.padding[:2], *window.dilation, C=c, GROUPS=groups, KH=window.kernel[0], KW=window.kernel[1],
        BM=config.bm, BN=config.bn, BK=config.bk, SPLIT=config.split, BAND=config.band,
        ACC=tl.int32 if x.dtype == torch.int8 else tl.float32, ACT=after.act, CODES=y.dtype == torch.int8,
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
    return y


def is_matmul(window: Window, after: Finish, groups: int) -> bool:
    """Whether a convolution of whole channels is a matmul of its pixels, with an epilogue that w8a8.py has."""
    visited = window.kernel == (1, 1) == window.stride and not any(window.padding) and groups == 1
    return (
        visited
        and after.slope is after.sample_scale is None
        and (after.other is None or after.other.dtype != torch.int8)
    )


def _kernel(x: Tensor, weight: Tensor, correction: Tensor | None, *rest: Any) -> Tensor:
    check_device("conv2d", x)
    return convolve(x, weight, correction, *arguments(rest))


def _reference(x: Tensor, weight: Tensor, correction: Tensor | None, *rest: Any) -> Tensor:
    window, after, groups = arguments(rest)
    check("conv2d", x, weight, correction, window, groups)
    y = empty_image(x, weight.shape[0], window, after.out_dtype)
    after.check("conv2d", y)
    after.check_samples("conv2d", x, correction is not None)
    if y.numel() == 0:
        return y
    return y.copy_(after.reference(exact_sums(x, weight, correction, window, groups, after.sample_zero)))


def _fake(x: Tensor, weight: Tensor, correction: Tensor | None, *rest: Any) -> Tensor:
    window, after, _ = arguments(rest)
    return empty_image(x, weight.shape[0], window, after.out_dtype)


SCHEMA = f"conv2d(Tensor x, Tensor weight, Tensor? correction, {ARGUMENTS}) -> Tensor"
define(SCHEMA, _kernel, _reference, _fake)
