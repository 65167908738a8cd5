"""What a convolution does behind its sums, in plain torch, and its arguments, checked."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qpass_kernels.epilogue import Epilogue, check_residual, check_vector

SLOPED = ("prelu", "cap")


@dataclass(frozen=True, eq=False)
class Finish:
    """The epilogue of a convolution: Epilogue's fields, a residual that may be codes, slopes [N], and what the scale and the
    zero point of each image of x are, float32 and int32 [B] (any shape of B elements), where it has its own.
    """

    alpha: Tensor
    beta: Tensor | None = None
    other: Tensor | None = None
    other_scale: float = 1.0
    other_zero: int = 0
    act: str = ""
    slope: Tensor | None = None
    out_scale: float = 1.0
    out_zero: int = 0
    out_dtype: torch.dtype = torch.float32
    sample_scale: Tensor | None = None
    sample_zero: Tensor | None = None

    def check(self, op: str, y: Tensor) -> None:
        """Raises ValueError where an argument does not fit a result like y [B, N, OH, OW]."""
        n, device = y.shape[1], y.device
        if (self.act in SLOPED) != (self.slope is not None):
            raise ValueError(
                f"{op}: {' and '.join(SLOPED)} need slope, and nothing else takes it: activation {self.act!r}"
            )
        if self.slope is not None:
            check_vector(op, "slope", self.slope, n, (torch.float32,), device)
        self.plain().check(op, y.numel() // max(n, 1), n, device)
        for name, dtype in (("sample_scale", torch.float32), ("sample_zero", torch.int32)):
            if getattr(self, name) is not None:
                check_vector(op, name, getattr(self, name), y.shape[0], (dtype,), device)
        if self.sample_zero is not None and self.sample_scale is None:
            raise ValueError(f"{op}: sample_zero needs sample_scale")
        if self.other is None:
            return
        if self.other.shape != y.shape:
            raise ValueError(f"{op}: other must be {tuple(y.shape)}, not {tuple(self.other.shape)}")
        if self.other.dtype != torch.int8:
            check_residual(op, channels_last(self.other), y.numel() // max(n, 1), n, device)
        elif (
            self.other.device != device or not 0 < self.other_scale < float("inf") or not -128 <= self.other_zero <= 127
        ):
            raise ValueError(
                f"{op}: codes as other must be on {device} with a finite positive scale and a zero in -128 .. 127, not on "
                f"{self.other.device} with {self.other_scale} and {self.other_zero}"
            )

    def check_samples(self, op: str, x: Tensor, corrected: bool) -> None:
        """Raises ValueError where zero points of images do not fit x. corrected: whether sums of the weights are given."""
        if self.sample_zero is not None and (x.dtype != torch.int8 or not corrected):
            raise ValueError(
                f"{op}: sample_zero is of int8, with the correction of a zero point of 1, not of {x.dtype}"
            )

    @property
    def vectors(self) -> tuple[Tensor | None, ...]:
        """What kernels look up by channel or by image."""
        return self.alpha, self.beta, self.slope, self.sample_scale, self.sample_zero

    @property
    def numbers(self) -> tuple[float, ...]:
        """What is the same for all: of the residual's codes, and of those that are written."""
        return self.other_scale, float(self.other_zero), 1.0 / self.out_scale, float(self.out_zero)

    def plain(self) -> Epilogue:
        """What is an Epilogue of this: without the residual, and without an activation that takes slopes."""
        act = "" if self.act in SLOPED else self.act
        return Epilogue(
            self.alpha, self.beta, act=act, out_scale=self.out_scale, out_zero=self.out_zero, out_dtype=self.out_dtype
        )

    def reference(self, acc: Tensor) -> Tensor:
        """The result from exact sums [B, N, OH, OW], float64."""
        other = None if self.other is None else channels_last(self.other).double()
        if other is not None and self.other.dtype == torch.int8:
            other = (other - self.other_zero) * self.other_scale
        if self.sample_scale is not None:
            acc = acc * self.sample_scale.double().reshape(-1, 1, 1, 1)
        y = Epilogue(self.alpha, self.beta, other=other).reference(channels_last(acc))
        if self.act == "prelu":
            y = torch.where(y > 0, y, y * self.slope)
        elif self.act == "cap":
            y = torch.minimum(functional.relu(y), self.slope)
        after = replace(self.plain(), alpha=torch.ones_like(self.alpha), beta=None)
        return after.reference(y.double()).permute(0, 3, 1, 2)


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] -> contiguous [B, H, W, C]; no copy where it lies so."""
    return x.permute(0, 2, 3, 1).contiguous()
