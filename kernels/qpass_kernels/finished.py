"""The epilogue alone: sums that another kernel left in memory become an op's output, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from qpass_kernels.blocks import finish
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.launch import OPTIONS, cdiv

ROWS, COLUMNS = 8, 256


@triton.jit(do_not_specialize=["M"])
def finished(
    acc, y, other, alpha, beta, offset, row_scale, row_zero, inverse, zero, M, N,
    BM: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    """[BM, BN] of sums [M, N]."""
    rn = tl.program_id(0) * BN + tl.arange(0, BN)
    rm = tl.program_id(1) * BM + tl.arange(0, BM)
    inside = (rm < M)[:, None] & (rn < N)[None, :]
    sums = tl.load(acc + rm.to(tl.int64)[:, None] * N + rn[None, :], mask=inside, other=0)
    finish(sums, y, other, rn, rm, M, N, alpha, beta, offset, row_scale, row_zero, inverse, zero, ACT, CODES, False)


def finish_sums(acc: Tensor, y: Tensor, epilogue: Epilogue, scaled: bool = False) -> None:
    """Writes y [M, N] from sums acc [M, N], int32 or float. scaled: alpha is in the sums already."""
    m, n = y.shape
    other = None if epilogue.other is None else epilogue.other.reshape(y.shape).contiguous()
    finished[cdiv(n, COLUMNS), cdiv(m, ROWS)](
        acc, y, other, None if scaled else epilogue.alpha, epilogue.beta, *rows(epilogue), m, n,
        BM=ROWS, BN=COLUMNS, ACT=epilogue.act, CODES=y.dtype == torch.int8, num_warps=4, **OPTIONS,
    )  # fmt: skip


def rows(epilogue: Epilogue) -> tuple[Tensor | None, Tensor | None, Tensor | None, float, float]:
    """(offset, row_scale, row_zero, inverse, zero) as kernels take them."""
    inverse, zero = 1.0 / epilogue.out_scale, float(epilogue.out_zero)
    return epilogue.offset, epilogue.row_scale, epilogue.row_zero, inverse, zero
