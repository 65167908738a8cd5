"""int8 activations times 4-bit weights in groups: sums of s_g (x @ q_g.T), then the epilogue of blocks.py.

A signed 4-bit code in the upper half of a byte is that byte's int8 value divided by 16, so two ANDs and a shift turn eight
codes into operands, with neither a zero point nor the sums of x to correct for; 1 / 16 is part of alpha. A group's int32
sum is exact and meets its scale in float32. offset: float32 [N], the row sums of the real weights over alpha, for x's zero.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.blocks import complete, part_of
from qpass_kernels.configs import Config
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.finished import rows
from qpass_kernels.launch import OPTIONS, cdiv, interpreting, scratch
from qpass_kernels.layouts import block_of, unpack
from qpass_kernels.matmul import check_groups, check_words, config_for, define_linear, residual, tiles
from qpass_kernels.unpack import halves
from qpass_kernels.w4a16 import group_of, real_weight, scale_at


@triton.jit(do_not_specialize=["M"])
def streamed(
    x, w, scale, y, other, alpha, beta, offset, row_scale, row_zero, partial, counters, inverse, zero, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, SPLIT: tl.constexpr,
    WHOLE: tl.constexpr, PLAIN: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One tile of BN outputs of BM tokens, one slice of K. BK: the layout's block; GROUP: codes of a scale, 0: a row."""
    ACC: tl.constexpr = tl.int32 if GROUP == 0 else tl.float32
    Q: tl.constexpr = BK // 2
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
    acc = tl.zeros((BN, BM), dtype=ACC)
    for block in range(first, last):
        q = tl.load(at_w, eviction_policy="evict_first")
        if WHOLE:
            x0 = tl.load(at_x, mask=tokens, other=0)
            x1 = tl.load(at_x + Q, mask=tokens, other=0)
        else:
            left = K - block * BK
            x0 = tl.load(at_x, mask=tokens & (rq < left)[:, None], other=0)
            x1 = tl.load(at_x + Q, mask=tokens & (rq < left - Q)[:, None], other=0)
        a0, a1 = halves(q, PLAIN)
        if GROUP == 0:
            acc = tl.dot(a0, x0, acc, out_dtype=tl.int32)
            acc = tl.dot(a1, x1, acc, out_dtype=tl.int32)
        elif GROUP >= BK:
            total = tl.dot(a0, x0, out_dtype=tl.int32)
            total = tl.dot(a1, x1, total, out_dtype=tl.int32)
            acc += total.to(tl.float32) * scale_at(scale, held, N, group_of(block * BK, K, GROUP, WHOLE))
        else:
            g0 = group_of(block * BK, K, GROUP, WHOLE)
            g1 = group_of(block * BK + Q, K, GROUP, WHOLE)
            acc += tl.dot(a0, x0, out_dtype=tl.int32).to(tl.float32) * scale_at(scale, held, N, g0)
            acc += tl.dot(a1, x1, out_dtype=tl.int32).to(tl.float32) * scale_at(scale, held, N, g1)
        at_w += Q
        at_x += BK
    complete(
        acc, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero,
        partial, counters, SPLIT, ACT, CODES,
    )  # fmt: skip


def check(op: str, x: Tensor, words: Tensor, scale: Tensor | None) -> None:
    """Raises ValueError unless the arguments fit: x int8 [..., K], packed rows [N, K] (layouts.py), scale [G, N] float16 or
    None for one scale a row.
    """
    if x.dtype != torch.int8:
        raise ValueError(f"{op}: x must be int8, not {x.dtype}")
    n, k = words.shape[0], x.shape[-1]
    check_groups(op, "scale", scale, torch.float16, n, k, "w4a8")
    block = block_of("w4a8", 0 if scale is None else k // scale.shape[0])
    check_words(op, words, torch.uint8, cdiv(k, block) * block // 2, k)


def sums(x: Tensor, words: Tensor, scale: Tensor | None) -> Tensor:
    """16 * x @ (codes * scale).T, float64 [M, N]: the factor is that of the codes in the upper halves of bytes."""
    k = x.shape[1]
    codes = unpack(words, "w4a8", k, block_of("w4a8", 0 if scale is None else k // scale.shape[0]))
    return 16 * (x.double() @ real_weight(codes, scale, None).t())


def launch(
    x: Tensor, words: Tensor, scale: Tensor | None, *, y: Tensor, epilogue: Epilogue, config: Config | None
) -> None:
    """Writes y [M, N] of x [M, K] and the packed weight."""
    (m, k), n = x.shape, words.shape[0]
    group = 0 if scale is None else k // scale.shape[0]
    block = block_of("w4a8", group)
    config = config_for("w4a8", m, n, k, x, config)
    grid = tiles(m, n, config)
    dtype = torch.int32 if group == 0 else torch.float32
    partial, counters = scratch(x, grid[0] * grid[1], config.split, config.bn * config.bm, dtype)
    streamed[grid](
        x, words, scale, y, residual(epilogue, y), epilogue.alpha, epilogue.beta, *rows(epilogue)[:3], partial, counters,
        *rows(epilogue)[3:], m, n, k, BM=config.bm, BN=config.bn, BK=block, GROUP=group, SPLIT=config.split,
        WHOLE=k % block == 0, PLAIN=interpreting(), ACT=epilogue.act, CODES=y.dtype == torch.int8,
        num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip


define_linear("w4a8_linear", "Tensor words, Tensor? scale", 2, check, sums, launch)
