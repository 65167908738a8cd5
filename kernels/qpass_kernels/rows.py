"""Rows that become 8-bit codes: the arguments that ops of quantize.py, norm_quantize.py and act_quantize.py share, checked,
and the formula in plain torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qpass_kernels.epilogue import check_vector

LIMIT = 16384  # columns of a row that a kernel keeps in registers; those beyond are read again
TILE = 2048  # elements of a program that has several rows
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
TOPS = {torch.int8: 127, torch.float8_e4m3fn: 448}
MIN_SCALE = 2.0**-126


@dataclass(frozen=True, eq=False)
class Rows:
    """mul, add: float32 [K], of y = x * mul + add. out_scale: of all rows, None where each finds its own. out_zero: of int8
    under an out_scale. symmetric: int8 without a zero point, -127 .. 127; float8_e4m3fn never has one.
    """

    mul: Tensor | None = None
    add: Tensor | None = None
    out_scale: float | None = None
    out_zero: int = 0
    dtype: torch.dtype = torch.int8
    symmetric: bool = False

    @property
    def centred(self) -> bool:
        """Whether rows that find their own scale have no zero point."""
        return self.symmetric or self.dtype != torch.int8

    @property
    def least(self) -> float:
        """The smallest code."""
        return -128.0 if self.dtype == torch.int8 and not self.symmetric else -float(TOPS[self.dtype])

    def check(self, op: str, x: Tensor) -> None:
        """Raises ValueError where an argument does not fit x [..., K]; looks at no value of a tensor."""
        if x.dim() < 1:
            raise ValueError(f"{op}: x must be [..., K], not a scalar")
        if x.dtype not in FLOATS:
            raise ValueError(f"{op}: x must be float32, bfloat16 or float16, not {x.dtype}")
        if self.dtype not in TOPS:
            raise ValueError(f"{op}: writes torch.int8 or torch.float8_e4m3fn, not {self.dtype}")
        if self.out_scale is not None and not MIN_SCALE <= self.out_scale <= torch.finfo(torch.float32).max:
            raise ValueError(f"{op}: the scale must be finite and at least 2^-126, not {self.out_scale}")
        if self.out_zero and (self.out_scale is None or self.centred):
            raise ValueError(f"{op}: a zero point of {self.out_zero} needs asymmetric int8 and a scale")
        if not -128 <= self.out_zero <= 127:
            raise ValueError(f"{op}: the zero point must lie in -128 .. 127, not {self.out_zero}")
        for name in ("mul", "add"):
            if getattr(self, name) is not None:
                check_vector(op, name, getattr(self, name), x.shape[-1], (torch.float32,), x.device)

    def empty(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(codes [..., K], scale float32 [..., 1], zero int32 [..., 1]) of x, not filled; [0] and [0] under an out_scale."""
        shape = (*x.shape[:-1], 1) if self.out_scale is None else (0,)
        codes = x.new_empty(x.shape, dtype=self.dtype)
        return codes, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.int32)

    def written(self, scale: Tensor, zero: Tensor) -> tuple[Tensor | None, Tensor | None, float, float]:
        """(scale, zero, out_scale, out_zero) as kernels take them: the two that hold."""
        if self.out_scale is None:
            return scale, zero, 1.0, 0.0
        return None, None, self.out_scale, float(self.out_zero)

    def reference(self, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same, filled, of y [..., K] before mul and add."""
        y = y.float()
        y = y if self.mul is None else y * self.mul
        y = y if self.add is None else y + self.add
        if self.out_scale is not None:
            scale = torch.tensor([self.out_scale], dtype=torch.float32, device=y.device)
            return self._codes(y, scale, self.out_zero), *self.empty(y)[1:]
        scale, zero = self._scales(y)
        return self._codes(y, scale, zero), scale, zero.to(torch.int32)

    def _scales(self, y: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.nn.functional.pad(y, (0, 1))  # a range holds 0
        lo, hi = y.amin(-1, keepdim=True), y.amax(-1, keepdim=True)
        scale = torch.maximum(-lo, hi) / TOPS[self.dtype] if self.centred else hi / 255 - lo / 255
        scale = torch.where(lo == hi, 1.0, scale.clamp(min=MIN_SCALE))
        if self.centred:
            return scale, torch.zeros_like(scale)
        return scale, torch.round(-lo / scale).clamp(0, 255).nan_to_num(nan=0.0) - 128

    def _codes(self, y: Tensor, scale: Tensor, zero: Any) -> Tensor:
        q = y / torch.where(scale.isfinite(), scale, math.nan)
        if self.dtype == torch.int8:
            q = (torch.round(q) + zero).nan_to_num(nan=self.least)
        return q.clamp(self.least, TOPS[self.dtype]).to(self.dtype)


def check_like(op: str, name: str, value: Tensor | None, x: Tensor) -> None:
    """Raises ValueError unless value is None or has the shape, dtype and device of x."""
    if value is None or (value.shape == x.shape and value.dtype == x.dtype and value.device == x.device):
        return
    expected, came = (f"{tuple(t.shape)} {t.dtype} on {t.device}" for t in (x, value))
    raise ValueError(f"{op}: {name} must be like x, {expected}, not {came}")


def flat(x: Tensor) -> Tensor:
    """X [..., K] as rows [M, K] whose last axis is contiguous; copied only where no stride does."""
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def shapes(m: int, k: int) -> dict[str, Any]:
    """ROWS and BLOCK of a program of rows of K columns, ONE: whether a block is a whole row. 16 elements a thread."""
    block = LIMIT // 2 if k > LIMIT else 1 << (max(k, 16) - 1).bit_length()
    rows = min(max(TILE // block, 1), 64, 1 << (m - 1).bit_length())
    return {"ROWS": rows, "BLOCK": block, "ONE": k <= block, "num_warps": min(max(rows * block // 512, 1), 32)}


def options(rows: Rows) -> dict[str, Any]:
    """What a kernel's last step is compiled for."""
    return {
        "SYMMETRIC": rows.centred,
        "TOP": float(TOPS[rows.dtype]),
        "LEAST": rows.least,
        "E4M3": rows.dtype == torch.float8_e4m3fn,
    }
