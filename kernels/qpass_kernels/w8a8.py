"""int8 x int8 and fp8 x fp8: x @ w.T, then the epilogue of blocks.py, requantized on demand.

Two kernels. `streamed` puts the weights on the left, [BN, BK] x [BK, BM], so that few tokens still fill a tensor core
instruction (64 rows of the left operand, 16 columns of the right), and splits K over programs until the card is full: it is
bound by the bytes of the weights. `persistent` walks over tiles [BM, BN] with tensor descriptors and is bound by arithmetic.

x: [M, K] and w: [N, K], both int8 or both float8_e4m3fn, K contiguous. Integer sums are exact in int32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from qpass_kernels.blocks import complete, finish, halved, part_of
from qpass_kernels.configs import Config
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.finished import finish_sums, rows
from qpass_kernels.launch import OPTIONS, cdiv, chip_of, scratch
from qpass_kernels.matmul import config_for, define_linear, residual, tiles


@triton.jit(do_not_specialize=["M"])
def streamed(
    x, w, y, other, alpha, beta, offset, row_scale, row_zero, partial, counters, inverse, zero, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr,
    WHOLE: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """One tile of BN outputs of BM tokens, one slice of K. WHOLE: K is a multiple of BK."""
    pn, pm, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rn = pn * BN + tl.arange(0, BN)
    rm = pm * BM + tl.arange(0, BM)
    rk = tl.arange(0, BK)
    first, last = part_of(tl.cdiv(K, BK), part, SPLIT)
    at_w = w + tl.minimum(rn, N - 1).to(tl.int64)[:, None] * K + (first * BK + rk)[None, :]
    at_x = x + rm.to(tl.int64)[None, :] * K + (first * BK + rk)[:, None]
    tokens = (rm < M)[None, :]
    acc = tl.zeros((BN, BM), dtype=ACC)
    for block in range(first, last):
        if WHOLE:
            a = tl.load(at_w, eviction_policy="evict_first")
            b = tl.load(at_x, mask=tokens, other=0.0)
        else:
            inside = rk < K - block * BK
            a = tl.load(at_w, mask=inside[None, :], other=0.0, eviction_policy="evict_first")
            b = tl.load(at_x, mask=tokens & inside[:, None], other=0.0)
        acc = tl.dot(a, b, acc, out_dtype=ACC)
        at_w += BK
        at_x += BK
    complete(
        acc, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero,
        partial, counters, SPLIT, ACT, CODES,
    )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def persistent(
    x_at, w_at, y, other, alpha, beta, offset, row_scale, row_zero, inverse, zero, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PROGRAMS: tl.constexpr, GROUP: tl.constexpr,
    ACC: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """Up to PROGRAMS programs take tiles in turn, GROUP rows of tiles at a time, so that neighbours share what they read."""
    tiles_m, tiles_n = tl.cdiv(M, BM), tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        band = tile // (GROUP * tiles_n)
        height = tl.minimum(tiles_m - band * GROUP, GROUP)
        inside = tile % (GROUP * tiles_n)
        pm = band * GROUP + inside % height
        pn = inside // height
        acc = tl.zeros((BM, BN), dtype=ACC)
        for block in range(tl.cdiv(K, BK)):
            a = x_at.load([pm * BM, block * BK])
            b = w_at.load([pn * BN, block * BK])
            acc = tl.dot(a, b.T, acc, out_dtype=ACC)
        rm = pm * BM + tl.arange(0, BM)
        rn = pn * BN + tl.arange(0, BN // 4)
        left, right = halved(acc)
        for part in tl.static_range(4):  # columns by quarters: the epilogue of all would not fit the registers
            if part % 2 == 0:
                now, then = halved(left if part == 0 else right)
            else:
                now = then
            finish(
                now, y, other, rn + part * (BN // 4), rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero,
                ACT, CODES, False,
            )  # fmt: skip


def check(op: str, x: Tensor, weight: Tensor) -> None:
    """Raises ValueError unless x [..., K] and weight [N, K] are both int8 or both float8_e4m3fn."""
    if x.dtype not in (torch.int8, torch.float8_e4m3fn) or weight.dtype != x.dtype:
        raise ValueError(f"{op}: x and weight must both be int8 or float8_e4m3fn, not {x.dtype} and {weight.dtype}")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1] or not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous [N, {x.shape[-1]}], not {tuple(weight.shape)}")


def sums(x: Tensor, weight: Tensor) -> Tensor:
    """The product x @ weight.T, float64 [M, N]: exact for int8."""
    return x.double() @ weight.double().t()


def why_not_library(x: Tensor, weight: Tensor, epilogue: Epilogue) -> str | None:
    """None where torch's own matmul takes this product, or why not."""
    k, n = x.shape[1], weight.shape[0]
    if x.dtype == torch.int8:
        return None if x.shape[0] > 16 and k % 8 == 0 and n % 8 == 0 else "_int_mm takes more than 16 rows, sizes of 8"
    if k % 16 or n % 16:
        return "_scaled_mm takes sizes that are multiples of 16"
    plain = not epilogue.act and epilogue.other is None and epilogue.out_dtype == torch.bfloat16
    return None if plain and epilogue.row_scale is not None else "_scaled_mm writes bfloat16 of plain products only"


def launch(x: Tensor, weight: Tensor, *, y: Tensor, epilogue: Epilogue, config: Config | None) -> None:
    """Writes y [M, N] of x [M, K] and weight [N, K]."""
    (m, k), n = x.shape, weight.shape[0]
    integers = x.dtype == torch.int8
    config = config_for("w8a8" if integers else "fp8", m, n, k, x, config)
    if config.how == "library" and why_not_library(x, weight, epilogue) is None:
        return _library(x, weight, y, epilogue)
    acc = tl.int32 if integers else tl.float32
    after = (epilogue.alpha, epilogue.beta, *rows(epilogue), m, n, k)
    kept = {"ACC": acc, "ACT": epilogue.act, "CODES": y.dtype == torch.int8}
    sizes = {"num_warps": config.warps, "num_stages": config.stages, **OPTIONS}
    if config.how == "persistent" and k % 16 == 0 and not (x.data_ptr() | weight.data_ptr()) % 16:
        x_at = TensorDescriptor.from_tensor(x, [config.bm, config.bk])
        w_at = TensorDescriptor.from_tensor(weight, [config.bn, config.bk])
        programs = chip_of(x.device).processors
        persistent[min(programs, cdiv(m, config.bm) * cdiv(n, config.bn)),](
            x_at, w_at, y, residual(epilogue, y), *after, BM=config.bm, BN=config.bn, BK=config.bk,
            PROGRAMS=programs, GROUP=config.band, **kept, **sizes,
        )  # fmt: skip
        return None
    grid = tiles(m, n, config)
    scratches = scratch(
        x, grid[0] * grid[1], config.split, config.bn * config.bm, torch.int32 if integers else torch.float32
    )
    streamed[grid](
        x, weight, y, residual(epilogue, y), *after[:5], *scratches, *after[5:], BM=config.bm, BN=config.bn,
        BK=config.bk, SPLIT=config.split, WHOLE=k % config.bk == 0, **kept, **sizes,
    )  # fmt: skip
    return None


def _library(x: Tensor, weight: Tensor, y: Tensor, epilogue: Epilogue) -> None:
    if x.dtype == torch.int8:
        finish_sums(torch._int_mm(x, weight.t()), y, epilogue)
        return
    scales = epilogue.row_scale.reshape(-1, 1), epilogue.alpha.reshape(1, -1)
    bias = None if epilogue.beta is None else epilogue.beta.to(y.dtype)
    torch._scaled_mm(x, weight.t(), *scales, bias, None, y.dtype, True, out=y)


define_linear("w8a8_linear", "Tensor weight", 1, check, sums, launch)
