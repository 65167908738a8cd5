"""Depthwise 2-d convolution of int8 or fp8: every channel has its own window, and y = act(acc * alpha + beta + other).

`depthwise` sums the taps of BM pixels by BN channels with plain multiply-adds, in int32 or float32: it is bound by memory.
Where the window hangs over the image it takes 0 in place of code - zero point, so there is no correction.

x: [B, C, H, W], stored channels last, else copied. weight: [KH * KW, C]. The epilogue is that of conv.py.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.configs import Config
from qpass_kernels.conv_blocks import settle
from qpass_kernels.conv_weights import (
    ARGUMENTS,
    Finish,
    Window,
    arguments,
    channels_last,
    check_image,
    empty_image,
    unpack_depthwise,
)
from qpass_kernels.launch import OPTIONS, cdiv, check_device
from qpass_kernels.matmul import define


@triton.jit(do_not_specialize=["M", "x_zero"])
def depthwise(
    x, w, y, other, x_zero, alpha, beta, slope, sample_scale, sample_zero, other_scale, other_zero, inverse, zero,
    M, N, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """BM pixels of BN channels."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    top = tl.where(rm < M, rm // OW % OH * stride_h - pad_h, H)
    left = rm % OW * stride_w - pad_w
    at_x = x + ((rm // (OH * OW)).to(tl.int64) * H * W + top * W + left) * N
    sample = tl.where(rm < M, rm // (OH * OW), 0)
    if sample_zero is not None:
        x_zero = tl.load(sample_zero + sample)[:, None]
    acc = tl.zeros((BM, BN), dtype=ACC)
    for kh in range(KH):
        for kw in tl.static_range(KW):
            row, column = top + kh * dil_h, left + kw * dil_w
            inside = ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None] & (rn < N)[None, :]
            step = (kh * dil_h * W + kw * dil_w) * N
            code = tl.load(at_x[:, None] + (step + rn)[None, :], mask=inside, other=0.0).to(ACC)
            tap = tl.load(w + (kh * KW + kw) * N + rn, mask=rn < N, other=0.0).to(ACC)
            if code.dtype == tl.int32:
                code = tl.where(inside, code - x_zero, 0)
            acc += code * tap[None, :]
    settle(
        acc, y, other, rm, rn, M, N, None, None, alpha, beta, slope, sample, sample_scale, None, other_scale, other_zero,
        inverse, zero, ACT, CODES,
    )  # fmt: skip


def check(op: str, x: Tensor, weight: Tensor, x_zero: int, window: Window, groups: int) -> None:
    """Raises ValueError unless x is an image and weight [KH * KW, C] has one output for each of its channels."""
    check_image(op, x, weight, window)
    kh, kw = window.kernel
    if groups != x.shape[1] or weight.shape != (kh * kw, groups):
        raise ValueError(
            f"{op}: takes one group and one output for each of {x.shape[1]} channels, weight ({kh * kw}, {x.shape[1]}), not "
            f"{groups} groups and {tuple(weight.shape)}"
        )
    if not -128 <= x_zero <= 127 or (x_zero and x.dtype != torch.int8):
        raise ValueError(f"{op}: x_zero must lie in -128 .. 127, and be 0 unless x is int8: {x_zero}")


def convolve(
    x: Tensor, weight: Tensor, x_zero: int, window: Window, after: Finish, groups: int, config: Config | None = None
) -> Tensor:
    """The launcher of `depthwise2d`: [B, C, H, W] -> [B, C, OH, OW]."""
    check("depthwise2d", x, weight, x_zero, window, groups)
    n = weight.shape[1]
    y = empty_image(x, n, window, after.out_dtype)
    after.check("depthwise2d", y)
    after.check_samples("depthwise2d", x, True)
    if y.numel() == 0:
        return y
    m = y.numel() // n
    config = config or rule(n)
    depthwise[cdiv(m, config.bm), cdiv(n, config.bn)](
        channels_last(x), weight, y, None if after.other is None else channels_last(after.other), x_zero, *after.vectors,
        *after.numbers, m, n, *x.shape[2:], *y.shape[2:], *window.stride, *window.padding[:2], *window.dilation,
        KH=window.kernel[0], KW=window.kernel[1], BM=config.bm, BN=config.bn,
        ACC=tl.int32 if x.dtype == torch.int8 else tl.float32, ACT=after.act, CODES=y.dtype == torch.int8,
        num_warps=config.warps, **OPTIONS,
    )  # fmt: skip
    return y


def rule(n: int) -> Config:
    """Tiles of 16 bytes a thread: 2048 values, as many of them channels as there are, up to 128."""
    bn = min(max(triton.next_power_of_2(n), 16), 128)
    return Config(bm=2048 // bn, bn=bn, warps=4)


def sums(x: Tensor, weight: Tensor, x_zero: int | Tensor, window: Window) -> Tensor:
    """The sums of the centred codes, [B, C, OH, OW], float64: exact for int8."""
    return window.slide(x.double() - x_zero, unpack_depthwise(weight, window.kernel).double())


def _kernel(x: Tensor, weight: Tensor, x_zero: int, *rest: Any) -> Tensor:
    check_device("depthwise2d", x)
    return convolve(x, weight, x_zero, *arguments(rest))


def _reference(x: Tensor, weight: Tensor, x_zero: int, *rest: Any) -> Tensor:
    window, after, groups = arguments(rest)
    check("depthwise2d", x, weight, x_zero, window, groups)
    y = empty_image(x, weight.shape[1], window, after.out_dtype)
    after.check("depthwise2d", y)
    after.check_samples("depthwise2d", x, True)
    zero = x_zero if after.sample_zero is None else after.sample_zero.double().reshape(-1, 1, 1, 1)
    return y.copy_(after.reference(sums(x, weight, zero, window))) if y.numel() else y


def _fake(x: Tensor, weight: Tensor, x_zero: int, *rest: Any) -> Tensor:
    window, after, _ = arguments(rest)
    return empty_image(x, weight.shape[1], window, after.out_dtype)


SCHEMA = f"depthwise2d(Tensor x, Tensor weight, int x_zero, {ARGUMENTS}) -> Tensor"
define(SCHEMA, _kernel, _reference, _fake)
