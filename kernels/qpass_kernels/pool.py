"""Max pooling in two dimensions, channels last: torch has none of int8 on CUDA. The maximum commutes with quantizing.

x: [B, C, H, W], int8, float8_e4m3fn or float, stored channels last, else copied. Padding is below every value. NaN wins.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from qpass_kernels.conv_weights import WINDOW, Window, channels_last, empty_image
from qpass_kernels.launch import OPTIONS, cdiv, check_device
from qpass_kernels.matmul import define

TYPES = (torch.int8, torch.float8_e4m3fn, torch.float16, torch.bfloat16, torch.float32)


@triton.jit(do_not_specialize=["M"])
def largest(
    x, y, M, N, H, W, OH, OW, stride_h, stride_w, pad_h, pad_w, dil_h, dil_w,
    KH: tl.constexpr, KW: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """BM pixels of BN channels, in int32 or float32: exact for every type."""
    rm = tl.program_id(0) * BM + tl.arange(0, BM)
    rn = tl.program_id(1) * BN + tl.arange(0, BN)
    top = tl.where(rm < M, rm // OW % OH * stride_h - pad_h, H)
    left = rm % OW * stride_w - pad_w
    at_x = x + ((rm // (OH * OW)).to(tl.int64) * H * W + top * W + left) * N
    LEAST: tl.constexpr = -128 if x.dtype.element_ty == tl.int8 else float("-inf")
    WIDE: tl.constexpr = tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32
    most = tl.full((BM, BN), LEAST, dtype=WIDE)
    for kh in range(KH):
        for kw in tl.static_range(KW):
            row, column = top + kh * dil_h, left + kw * dil_w
            inside = ((row >= 0) & (row < H) & (column >= 0) & (column < W))[:, None] & (rn < N)[None, :]
            step = (kh * dil_h * W + kw * dil_w) * N
            value = tl.load(at_x[:, None] + (step + rn)[None, :], mask=inside, other=0.0).to(WIDE)
            most = tl.maximum(most, tl.where(inside, value, LEAST), propagate_nan=tl.PropagateNan.ALL)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    tl.store(y + rm.to(tl.int64)[:, None] * N + rn[None, :], most.to(y.dtype.element_ty), mask=inside)


def window_of(kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]) -> Window:
    """The window of torch's arguments: without a stride, windows lie side by side."""
    return Window(*map(tuple, (kernel, stride or kernel, padding, dilation)))


def check(x: Tensor, window: Window, ceil_mode: bool) -> None:
    """Raises ValueError where torch's max_pool2d would."""
    window.check("max_pool2d")
    if x.dim() != 4 or x.dtype not in TYPES:
        types = ", ".join(map(str, TYPES))
        raise ValueError(f"max_pool2d: x must be [B, C, H, W] of {types}, not {tuple(x.shape)} {x.dtype}")
    half = tuple(size // 2 for size in window.kernel)
    if len(window.padding) != 2 or any(p > h for p, h in zip(window.padding, half, strict=True)):
        raise ValueError(
            f"max_pool2d: padding must be two numbers, at most half of the kernel {half}, not {window.padding}"
        )
    if min(window.sizes(x.shape[2], x.shape[3], ceil_mode)) < 1:
        raise ValueError(f"max_pool2d: the window {window} does not fit on an image of {x.shape[2]} x {x.shape[3]}")


def pool(x: Tensor, window: Window, ceil_mode: bool) -> Tensor:
    """The launcher of `max_pool2d`: [B, C, H, W] -> [B, C, OH, OW]."""
    check(x, window, ceil_mode)
    y = empty_image(x, x.shape[1], window, x.dtype, ceil_mode)
    if y.numel() == 0:
        return y
    n = x.shape[1]
    m, bn = y.numel() // n, min(max(triton.next_power_of_2(n), 16), 128)
    bm = 2048 // bn
    largest[cdiv(m, bm), cdiv(n, bn)](
        channels_last(x), y, m, n, *x.shape[2:], *y.shape[2:], *window.stride, *window.padding, *window.dilation,
        KH=window.kernel[0], KW=window.kernel[1], BM=bm, BN=bn, num_warps=4, **OPTIONS,
    )  # fmt: skip
    return y


def _kernel(x: Tensor, *args: Any) -> Tensor:
    check_device("max_pool2d", x)
    return pool(x, window_of(*args[:4]), args[4])


def _reference(x: Tensor, *args: Any) -> Tensor:
    window, ceil_mode = window_of(*args[:4]), args[4]
    check(x, window, ceil_mode)
    y = empty_image(x, x.shape[1], window, x.dtype, ceil_mode)
    if y.numel() == 0:
        return y
    pooled = functional.max_pool2d(x.float(), window.kernel, window.stride, window.padding, window.dilation, ceil_mode)
    return y.copy_(pooled.clamp_min(-128) if x.dtype == torch.int8 else pooled)


def _fake(x: Tensor, *args: Any) -> Tensor:
    return empty_image(x, x.shape[1], window_of(*args[:4]), x.dtype, args[4])


define(f"max_pool2d(Tensor x, {WINDOW}, bool ceil_mode) -> Tensor", _kernel, _reference, _fake)
