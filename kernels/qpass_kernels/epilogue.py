"""What a matmul does with its sums, as the arguments of an op, checked, and in plain torch.

y = act((acc - offset[n] * row_zero[m]) * alpha[n] * row_scale[m] + beta[n] + other[m, n])
out_dtype int8:           clamp(round(y / out_scale) + out_zero, -128, 127)
out_dtype float8_e4m3fn:  clamp(y / out_scale, -448, 448)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from qpass_kernels.activations import NAMES

OUTPUTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn)
ARGUMENTS = (
    "Tensor alpha, Tensor? beta, Tensor? offset, Tensor? row_scale, Tensor? row_zero, Tensor? other, str act, "
    "float out_scale, int out_zero, ScalarType out_dtype"
)
ACTIVATIONS = {
    "": lambda y: y,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda y: functional.gelu(y, approximate="tanh"),
    "silu": functional.silu,
    "relu6": functional.relu6,
    "hardswish": functional.hardswish,
    "hardsigmoid": functional.hardsigmoid,
    "sigmoid": torch.sigmoid,
}


@dataclass(frozen=True, eq=False)
class Epilogue:
    """alpha, beta: float32 [N]. offset: [N], int32 or float32. row_scale: float32, row_zero: int32, of M elements.
    other: float [..., N] of M rows. out_scale, out_zero: of the codes where out_dtype is int8 or float8_e4m3fn.
    """

    alpha: Tensor
    beta: Tensor | None = None
    offset: Tensor | None = None
    row_scale: Tensor | None = None
    row_zero: Tensor | None = None
    other: Tensor | None = None
    act: str = ""
    out_scale: float = 1.0
    out_zero: int = 0
    out_dtype: torch.dtype = torch.float32

    def check(self, op: str, m: int, n: int, device: torch.device) -> None:
        """Raises ValueError where an argument does not fit a product [M, N]; looks at no value of a tensor."""
        if self.act not in NAMES:
            raise ValueError(f"{op}: activation {self.act!r} is not one of {', '.join(filter(None, NAMES))}")
        if self.out_dtype not in OUTPUTS:
            raise ValueError(f"{op}: writes {', '.join(map(str, OUTPUTS))}, not {self.out_dtype}")
        if not 0 < self.out_scale < float("inf"):
            raise ValueError(f"{op}: out_scale must be finite and positive, not {self.out_scale}")
        if not -128 <= self.out_zero <= 127 or (self.out_zero and self.out_dtype != torch.int8):
            raise ValueError(
                f"{op}: out_zero must lie in -128 .. 127, and be 0 unless int8 is written: {self.out_zero}"
            )
        if self.row_zero is not None and self.offset is None:
            raise ValueError(f"{op}: row_zero needs offset, the sums of each weight row")
        floats, numbers = (torch.float32,), (torch.int32, torch.float32)
        vectors = (("alpha", n, floats), ("beta", n, floats), ("offset", n, numbers), ("row_scale", m, floats))
        for name, size, dtypes in (*vectors, ("row_zero", m, (torch.int32,))):
            value = getattr(self, name)
            if value is not None:
                check_vector(op, name, value, size, dtypes, device)
        if self.other is not None:
            check_residual(op, self.other, m, n, device)

    def reference(self, acc: Tensor) -> Tensor:
        """The op's output from exact sums [M, N], float64."""
        y = acc
        if self.offset is not None:
            column = self.offset.double()
            y = y - (column if self.row_zero is None else column * self.row_zero.double().reshape(-1, 1))
        y = y * self.alpha.double()
        if self.row_scale is not None:
            y = y * self.row_scale.double().reshape(-1, 1)
        if self.beta is not None:
            y = y + self.beta.double()
        if self.other is not None:
            y = y + self.other.reshape(y.shape).double()
        y = ACTIVATIONS[self.act](y.float())
        if self.out_dtype == torch.int8:
            return (torch.round(y / self.out_scale) + self.out_zero).clamp(-128, 127).to(torch.int8)
        if self.out_dtype == torch.float8_e4m3fn:
            return (y / self.out_scale).clamp(-448, 448).to(self.out_dtype)
        return y.to(self.out_dtype)


def check_vector(
    op: str, name: str, value: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device
) -> None:
    """Raises ValueError unless value has `size` contiguous elements of one of the dtypes on the device."""
    if value.numel() != size:
        raise ValueError(f"{op}: {name} must have {size} elements, not {value.numel()}")
    if value.dtype not in dtypes:
        raise ValueError(f"{op}: {name} must be {' or '.join(map(str, dtypes))}, not {value.dtype}")
    if not value.is_contiguous():
        raise ValueError(f"{op}: {name} must be contiguous, its strides are {value.stride()}")
    if value.device != device:
        raise ValueError(f"{op}: {name} is on {value.device}, the input on {device}")


def check_residual(op: str, other: Tensor, m: int, n: int, device: torch.device) -> None:
    """Raises ValueError unless other can be added to a product [M, N]."""
    if other.numel() != m * n or (other.dim() and other.shape[-1] != n):
        raise ValueError(f"{op}: other must be [..., {n}] of {m} rows, not {tuple(other.shape)}")
    if not other.is_floating_point() or other.dtype == torch.float64:
        raise ValueError(f"{op}: other must be float32, bfloat16 or float16, not {other.dtype}")
    if other.device != device:
        raise ValueError(f"{op}: other is on {other.device}, the input on {device}")
