"""Float activations times 8-bit weights, one scale a row: y = act((x @ q.T) * alpha + beta + other).

`streamed` as in w4a16.py: bytes become the left operand in registers, as exact integers in 16-bit floats, and the scale
multiplies the float32 sum. `dequantized` writes the weights as 16-bit floats once, for torch's own matmul.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.blocks import complete, part_of
from qpass_kernels.configs import Config
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.finished import finish_sums, rows
from qpass_kernels.launch import OPTIONS, cdiv, interpreting, scratch
from qpass_kernels.layouts import BLOCK, unpack
from qpass_kernels.matmul import check_float_input, check_words, config_for, define_linear, residual, tiles
from qpass_kernels.unpack import bytes_of


@triton.jit(do_not_specialize=["M"])
def streamed(
    x, w, y, other, alpha, beta, partial, counters, inverse, zero, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, WHOLE: tl.constexpr, PLAIN: tl.constexpr, ACT: tl.constexpr,
    CODES: tl.constexpr,
):  # fmt: skip
    """One tile of BN outputs of BM tokens, one slice of K."""
    DTYPE: tl.constexpr = x.dtype.element_ty
    BK: tl.constexpr = 128
    Q: tl.constexpr = 64
    pn, pm, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = pn * BN + tl.arange(0, BN)
    rm = pm * BM + tl.arange(0, BM)
    rq = tl.arange(0, Q)
    blocks = tl.cdiv(K, BK)
    first, last = part_of(blocks, part, SPLIT)
    at_w = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * (blocks * Q) + (first * Q + rq)[None, :]
    at_x = x + rm.to(tl.int64)[None, :] * K + (first * BK + rq)[:, None]
    tokens = (rm < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for block in range(first, last):
        q = tl.load(at_w, eviction_policy="evict_first")
        if WHOLE:
            x0 = tl.load(at_x, mask=tokens, other=0.0)
            x1 = tl.load(at_x + Q, mask=tokens, other=0.0)
        else:
            left = K - block * BK
            x0 = tl.load(at_x, mask=tokens & (rq < left)[:, None], other=0.0)
            x1 = tl.load(at_x + Q, mask=tokens & (rq < left - Q)[:, None], other=0.0)
        a0, a1 = bytes_of(q, DTYPE, PLAIN)
        acc = tl.dot(a0, x0, acc)
        acc = tl.dot(a1, x1, acc)
        at_w += Q
        at_x += BK
    complete(
        acc, y, other, rn, rm, M, N, alpha, beta, None, None, None, inverse, zero,
        partial, counters, SPLIT, ACT, CODES,
    )  # fmt: skip


@triton.jit
def dequantized(w, alpha, real, N, K, BN: tl.constexpr):
    """[BN, 128] of the weights as floats [N, K]."""
    Q: tl.constexpr = 64
    block = tl.program_id(1)
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    held = tl.minimum(rn, N - 1)
    rq = tl.arange(0, Q)
    q = tl.load(w + held.to(tl.int64)[:, None] * (tl.cdiv(K, 128) * Q) + (block * Q + rq)[None, :])
    row = tl.load(alpha + held)[:, None]
    for i in tl.static_range(2):
        k = block * 128 + i * Q
        code = ((q >> 8 * i) & 255).to(tl.uint8).to(tl.int8, bitcast=True)
        to = real + rn.to(tl.int64)[:, None] * K + (k + rq)[None, :]
        value = (code.to(tl.float32) * row).to(real.dtype.element_ty)
        tl.store(to, value, mask=(rn < N)[:, None] & (k + rq < K)[None, :])


def check(op: str, x: Tensor, words: Tensor) -> None:
    """Raises ValueError unless x [..., K] is a 16-bit float and words are the packed rows [N, K] (layouts.py)."""
    check_float_input(op, x)
    k = x.shape[-1]
    check_words(op, words, torch.uint16, cdiv(k, BLOCK) * BLOCK // 2, k)


def sums(x: Tensor, words: Tensor) -> Tensor:
    """The product x @ codes.T, float64 [M, N]."""
    return x.double() @ unpack(words, "w8a16", x.shape[1]).double().t()


def launch(x: Tensor, words: Tensor, *, y: Tensor, epilogue: Epilogue, config: Config | None) -> None:
    """Writes y [M, N] of x [M, K] and the packed weight."""
    (m, k), n = x.shape, words.shape[0]
    config = config_for("w8a16", m, n, k, x, config)
    if config.how == "dequantized":
        real = torch.empty((n, k), dtype=x.dtype, device=x.device)
        grid = cdiv(n, config.bn), cdiv(k, BLOCK)
        dequantized[grid](words, epilogue.alpha, real, n, k, BN=config.bn, num_warps=4, **OPTIONS)
        return multiply(x, real, y, epilogue)
    grid = tiles(m, n, config)
    partial, counters = scratch(x, grid[0] * grid[1], config.split, config.bn * config.bm, torch.float32)
    streamed[grid](
        x, words, y, residual(epilogue, y), epilogue.alpha, epilogue.beta, partial, counters, *rows(epilogue)[3:], m, n, k,
        BM=config.bm, BN=config.bn, SPLIT=config.split, WHOLE=k % BLOCK == 0, PLAIN=interpreting(), ACT=epilogue.act,
        CODES=y.dtype == torch.int8, num_warps=config.warps, num_stages=config.stages, **OPTIONS,
    )  # fmt: skip
    return None


def multiply(x: Tensor, real: Tensor, y: Tensor, epilogue: Epilogue) -> None:
    """Writes y from x and dequantized weights [N, K] by torch's own matmul, whose result is rounded to x's dtype."""
    if epilogue.beta is None and epilogue.other is None and not epilogue.act and y.dtype == x.dtype:
        torch.mm(x, real.t(), out=y)
    else:
        finish_sums(torch.mm(x, real.t()), y, epilogue, scaled=True)


define_linear("w8a16_linear", "Tensor words", 1, check, sums, launch)
