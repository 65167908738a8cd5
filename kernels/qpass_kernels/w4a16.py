"""Float activations times 4-bit weights in groups: y = act((x @ ((q - zero) * scale).T) * alpha + beta + other).

`streamed` keeps the packed weights on their way from memory to registers as they are: words are loaded asynchronously,
turned into the left operand in registers (unpack.py), multiplied exactly as integers in 16-bit floats, and the group's scale
multiplies the float32 sum. So a weight is never rounded again. Few tokens: bound by the bytes of the weights, as long as a
weight costs less than 3.4 instructions on an H200.

`dequantized` writes the weights as 16-bit floats once, for a product in torch's own matmul; that is better for many tokens.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.blocks import complete, part_of
from qpass_kernels.configs import Config
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.finished import rows
from qpass_kernels.launch import OPTIONS, cdiv, interpreting, scratch
from qpass_kernels.layouts import BLOCK, unpack
from qpass_kernels.matmul import (
    check_float_input,
    check_groups,
    check_words,
    config_for,
    define_linear,
    residual,
    tiles,
)
from qpass_kernels.unpack import nibbles
from qpass_kernels.w8a16 import multiply


@triton.jit
def group_of(k, K, GROUP: tl.constexpr, WHOLE: tl.constexpr):
    """The group that input k belongs to; beyond the end of a row that is not WHOLE blocks, the last."""
    if not WHOLE:
        k = tl.minimum(k, K - 1)
    return k // GROUP


@triton.jit
def scale_at(scale, rn, N, group):
    """float32 [BN, 1]: the scales of a group."""
    return tl.load(scale + group * N + rn).to(tl.float32)[:, None]


@triton.jit
def zero_at(zero, rn, N, group):
    """uint8 [BN, 1]: the zero points of a group."""
    return tl.load(zero + group * N + rn)[:, None]


@triton.jit(do_not_specialize=["M"])
def streamed(
    x, w, scale, z, y, other, alpha, beta, partial, counters, inverse, zero, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr,
    PLAIN: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One tile of BN outputs of BM tokens, one slice of K. GROUP: codes of a scale; 0 is all of a row."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    BK: tl.constexpr = 128
    Q: tl.constexpr = 32
    pn, pm, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = pn * BN + tl.arange(0, BN)
    held = tl.minimum(rn, N - 1)
    rm = pm * BM + tl.arange(0, BM)
    rq = tl.arange(0, Q)
    blocks = tl.cdiv(K, BK)
    first, last = part_of(blocks, part, SPLIT)
    at_w = w + held.to(tl.int64)[:, None] * (blocks * Q) + (first * Q + rq)[None, :]
    at_x = x + rm.to(tl.int64)[None, :] * K + (first * BK + rq)[:, None]
    tokens = (rm < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    if GROUP == 0:
        z0 = zero_at(z, held, N, 0)
    for block in range(first, last):
        q = tl.load(at_w, eviction_policy="evict_first")
        if WHOLE:
            x0 = tl.load(at_x, mask=tokens, other=0.0)
            x1 = tl.load(at_x + Q, mask=tokens, other=0.0)
            x2 = tl.load(at_x + 2 * Q, mask=tokens, other=0.0)
            x3 = tl.load(at_x + 3 * Q, mask=tokens, other=0.0)
        else:
            left = K - block * BK
            x0 = tl.load(at_x, mask=tokens & (rq < left)[:, None], other=0.0)
            x1 = tl.load(at_x + Q, mask=tokens & (rq < left - Q)[:, None], other=0.0)
            x2 = tl.load(at_x + 2 * Q, mask=tokens & (rq < left - 2 * Q)[:, None], other=0.0)
            x3 = tl.load(at_x + 3 * Q, mask=tokens & (rq < left - 3 * Q)[:, None], other=0.0)
        if GROUP == 0:
            a0, a1, a2, a3 = nibbles(q, z0, DTYPE, PLAIN)
            acc = tl.dot(a0, x0, acc)
            acc = tl.dot(a1, x1, acc)
            acc = tl.dot(a2, x2, acc)
            acc = tl.dot(a3, x3, acc)
        elif GROUP >= BK:
            g = group_of(block * BK, K, GROUP, WHOLE)
            a0, a1, a2, a3 = nibbles(q, zero_at(z, held, N, g), DTYPE, PLAIN)
            total = tl.dot(a0, x0)
            total = tl.dot(a1, x1, total)
            total = tl.dot(a2, x2, total)
            total = tl.dot(a3, x3, total)
            acc += total * scale_at(scale, held, N, g)
        elif GROUP == 64:
            g0 = group_of(block * BK, K, GROUP, WHOLE)
            g1 = group_of(block * BK + 64, K, GROUP, WHOLE)
            a0, a1, _, _ = nibbles(q, zero_at(z, held, N, g0), DTYPE, PLAIN)
            _, _, a2, a3 = nibbles(q, zero_at(z, held, N, g1), DTYPE, PLAIN)
            acc += tl.dot(a1, x1, tl.dot(a0, x0)) * scale_at(scale, held, N, g0)
            acc += tl.dot(a3, x3, tl.dot(a2, x2)) * scale_at(scale, held, N, g1)
        else:
            g0 = group_of(block * BK, K, GROUP, WHOLE)
            g1 = group_of(block * BK + 32, K, GROUP, WHOLE)
            g2 = group_of(block * BK + 64, K, GROUP, WHOLE)
            g3 = group_of(block * BK + 96, K, GROUP, WHOLE)
            a0, _, _, _ = nibbles(q, zero_at(z, held, N, g0), DTYPE, PLAIN)
            _, a1, _, _ = nibbles(q, zero_at(z, held, N, g1), DTYPE, PLAIN)
            _, _, a2, _ = nibbles(q, zero_at(z, held, N, g2), DTYPE, PLAIN)
            _, _, _, a3 = nibbles(q, zero_at(z, held, N, g3), DTYPE, PLAIN)
            acc += tl.dot(a0, x0) * scale_at(scale, held, N, g0)
            acc += tl.dot(a1, x1) * scale_at(scale, held, N, g1)
            acc += tl.dot(a2, x2) * scale_at(scale, held, N, g2)
            acc += tl.dot(a3, x3) * scale_at(scale, held, N, g3)
        at_w += Q
        at_x += BK
    complete(
        acc, y, other, rn, rm, M, N, alpha, beta, None, None, None, inverse, zero,
        partial, counters, SPLIT, ACT, CODES,
    )  # fmt: skip


@triton.jit
def dequantized(
    w, scale, z, alpha, real, N, K,
    BN: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """[BN, 128] of the weights as floats [N, K]; rounded once, from the float32 product of code and scale."""
    Q: tl.constexpr = 32
    DTYPE: tl.constexpr = real.dtype.element_ty
    block = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(rn, N - 1)
    rq = tl.arange(0, Q)
    q = tl.load(w + held.to(tl.int64)[:, None] * (tl.cdiv(K, 128) * Q) + (block * Q + rq)[None, :])
    row = tl.load(alpha + held)[:, None]
    for i in tl.static_range(4):
        k = block * 128 + i * Q
        code = ((q >> 4 * i) & 15).to(tl.int32)
        factor = row
        group = 0
        if GROUP != 0:
            group = tl.minimum(k, K - 1) // GROUP
            factor = row * scale_at(scale, held, N, group)
        value = (code - zero_at(z, held, N, group).to(tl.int32)).to(tl.float32) * factor
        to = real + rn.to(tl.int64)[:, None] * K + (k + rq)[None, :]
        tl.store(to, value.to(DTYPE), mask=(rn < N)[:, None] & (k + rq < K)[None, :])


def check(op: str, x: Tensor, words: Tensor, scale: Tensor | None, zero: Tensor) -> None:
    """Raises ValueError unless the arguments fit: x [..., K], packed rows [N, K] (layouts.py), scale [G, N] float16 or None
    for one scale a row, zero [G, N] uint8 (one group where scale is None).
    """
    check_float_input(op, x)
    (n, _), k = words.shape, x.shape[-1]
    check_words(op, words, torch.uint16, cdiv(k, BLOCK) * BLOCK // 4, k)
    check_groups(op, "scale", scale, torch.float16, n, k, "w4a16")
    check_groups(op, "zero", zero, torch.uint8, n, k, "w4a16")
    if zero.shape[0] != (1 if scale is None else scale.shape[0]):
        raise ValueError(f"{op}: zero has {zero.shape[0]} groups, scale {1 if scale is None else scale.shape[0]}")


def sums(x: Tensor, words: Tensor, scale: Tensor | None, zero: Tensor) -> Tensor:
    """The product x @ ((codes - zero) * scale).T, float64 [M, N]."""
    return x.double() @ real_weight(unpack(words, "w4a16", x.shape[1]), scale, zero).t()


def real_weight(codes: Tensor, scale: Tensor | None, zero: Tensor | None) -> Tensor:
    """(codes - zero) * scale without alpha, float64 [N, K]."""
    real = codes.double()
    k = real.shape[1]
    for value, turn in ((zero, torch.sub), (scale, torch.mul)):
        if value is not None:
            real = turn(real, value.double().t().repeat_interleave(k // value.shape[0], 1))
    return real


def fitted(config: Config, group: int) -> Config:
    """At most 64 tokens a tile for groups of 32: four sums beside the total leave no registers for more."""
    return replace(config, bm=min(config.bm, 64)) if group == 32 else config


def launch(
    x: Tensor,
    words: Tensor,
    scale: Tensor | None,
    zero: Tensor,
    *,
    y: Tensor,
    epilogue: Epilogue,
    config: Config | None,
) -> None:
    """Writes y [M, N] of x [M, K] and the packed weight."""
    (m, k), n = x.shape, words.shape[0]
    group = 0 if scale is None else k // scale.shape[0]
    config = fitted(config_for("w4a16", m, n, k, x, config), group)
    if config.how == "dequantized":
        real = torch.empty((n, k), dtype=x.dtype, device=x.device)
        grid = cdiv(n, config.bn), cdiv(k, BLOCK)
        dequantized[grid](
            words, scale, zero, epilogue.alpha, real, n, k, BN=config.bn, GROUP=group, num_warps=4, **OPTIONS
        )  # fmt: skip
        return multiply(x, real, y, epilogue)
    grid = tiles(m, n, config)
    partial, counters = scratch(x, grid[0] * grid[1], config.split, config.bn * config.bm, torch.float32)
    streamed[grid](
        x, words, scale, zero, y, residual(epilogue, y), epilogue.alpha, epilogue.beta, partial, counters,
        *rows(epilogue)[3:], m, n, k, BM=config.bm, BN=config.bn, GROUP=group, SPLIT=config.split,
        WHOLE=k % BLOCK == 0, PLAIN=interpreting(), ACT=epilogue.act, CODES=y.dtype == torch.int8,
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
    return None


define_linear("w4a16_linear", "Tensor words, Tensor? scale, Tensor zero", 3, check, sums, launch)
