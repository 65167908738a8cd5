"""Random products for the tuner, the benchmark and tests: arguments of each kind, and what they mean in float64.

The weights of a sample are random bits: every pattern of a packed word is a weight. What a sample stands for is
`real_x @ real_w.T`, computed apart from the kernels and their epilogue.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from qpass_kernels import matmul, w4a8, w4a16, w8a8, w8a16
from qpass_kernels.configs import Config
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.layouts import block_of, unpack
from qpass_kernels.w4a16 import real_weight

MODULES = {"w8a8": w8a8, "fp8": w8a8, "w8a16": w8a16, "w4a16": w4a16, "w4a8": w4a8}
GROUP = 128  # codes of a scale of 4-bit weights
PART = 4096  # outputs that are computed at once in float64


@dataclass(frozen=True, eq=False)
class Sample:
    """x [M, K] as the kind takes it, the weight arguments of its op, what happens to the sums."""

    kind: str
    x: Tensor
    weights: tuple[Tensor | None, ...]
    epilogue: Epilogue

    @property
    def size(self) -> tuple[int, int, int]:
        """M, N, K."""
        return self.x.shape[0], self.weights[0].shape[0], self.x.shape[1]

    def copies(self, count: int) -> list[Sample]:
        """The sample and others alike, whose weights lie elsewhere in memory."""
        clones = [tuple(None if w is None else w.clone() for w in self.weights) for _ in range(count - 1)]
        return [self, *(replace(self, weights=held) for held in clones)]


def make(kind: str, m: int, n: int, k: int, device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Sample:
    """A random product [M, K] x [N, K] that writes dtype; 8-bit inputs have a scale, int8 ones a zero point, a row."""
    device = torch.device(device)
    x = torch.randn(m, k, device=device)
    weights, alpha = _weights(kind, n, k, device)
    if kind in ("w8a16", "w4a16"):
        return Sample(kind, x.to(dtype), weights, Epilogue(alpha, out_dtype=dtype))
    if kind == "fp8":
        scale = x.abs().amax(1).clamp(min=1e-6) / 448
        after = Epilogue(alpha, row_scale=scale, out_dtype=dtype)
        return Sample(kind, (x / scale[:, None]).to(torch.float8_e4m3fn), weights, after)
    low, high = x.amin(1).clamp(max=0), x.amax(1).clamp(min=0)
    scale = (high - low).clamp(min=1e-6) / 255
    zero = (-128 - low / scale).round().to(torch.int32)
    codes = (x / scale[:, None]).round().add(zero[:, None]).clamp(-128, 127).to(torch.int8)
    after = Epilogue(alpha, offset=_column(kind, weights, k), row_scale=scale, row_zero=zero, out_dtype=dtype)
    return Sample(kind, codes, weights, after)


def run(sample: Sample, config: Config | None = None) -> Tensor:
    """The product by its kernel: [M, N]."""
    module = MODULES[sample.kind]
    name = "w8a8_linear" if sample.kind == "fp8" else f"{sample.kind}_linear"
    return matmul.run(name, sample.x, sample.weights, sample.epilogue, module.check, module.launch, config)


def real_x(sample: Sample, rows: Tensor) -> Tensor:
    """The activations of some rows, float64."""
    x, after = sample.x[rows].double(), sample.epilogue
    if after.row_zero is not None:
        x = x - after.row_zero.reshape(-1, 1)[rows]
    return x if after.row_scale is None else x * after.row_scale.reshape(-1, 1)[rows].double()


def real_w(sample: Sample, first: int, last: int) -> Tensor:
    """The weights of outputs first .. last, float64 [last - first, K]."""
    words, *rest = sample.weights
    rest = [None if part is None else part[:, first:last].contiguous() for part in rest]
    words, k = words[first:last], sample.x.shape[1]
    if sample.kind in ("w8a8", "fp8"):
        real = words.double()
    elif sample.kind == "w8a16":
        real = unpack(words, "w8a16", k).double()
    elif sample.kind == "w4a16":
        real = real_weight(unpack(words, "w4a16", k), *rest)
    else:
        group = 0 if rest[0] is None else k // rest[0].shape[0]
        real = 16 * real_weight(unpack(words, "w4a8", k, block_of("w4a8", group)), rest[0], None)
    return real * sample.epilogue.alpha[first:last, None].double()


def some_rows(m: int, count: int, device: torch.device) -> Tensor:
    """Up to count of M rows, the first and the last among them."""
    return torch.linspace(0, m - 1, min(m, count), device=device).round().long()


def exact(sample: Sample, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(the product of some rows in float64, the same by the plain path: both sides in the output's 16-bit floats)."""
    n, dtype = sample.weights[0].shape[0], sample.epilogue.out_dtype
    x = real_x(sample, rows)
    true, plain = [], []
    for first in range(0, n, PART):
        w = real_w(sample, first, min(first + PART, n))
        true.append(x @ w.t())
        plain.append(functional.linear(x.to(dtype), w.to(dtype)))
    return torch.cat(true, 1), torch.cat(plain, 1)


def errors(y: Tensor, true: Tensor) -> tuple[float, float]:
    """(largest, mean square) error as a part of the mean square of the true values; infinite where y is not finite."""
    largest, off, size = 0.0, 0.0, 0.0
    for found, wanted in zip(y.split(1024), true.split(1024), strict=True):
        wanted = wanted.double()
        size += float(wanted.square().sum())
        difference = found.double() - wanted
        off += float(difference.square().sum())
        largest = max(largest, float(difference.abs().nan_to_num(float("inf")).max()))
    if not off < float("inf"):
        return float("inf"), float("inf")
    unit = max(size / max(true.numel(), 1), 1e-60) ** 0.5
    return largest / unit, (off / max(true.numel(), 1)) ** 0.5 / unit


def _weights(kind: str, n: int, k: int, device: torch.device) -> tuple[tuple[Tensor | None, ...], Tensor]:
    """(the weight arguments, alpha)."""
    alpha = (torch.rand(n, device=device) + 0.5) / 1000
    if kind == "fp8":
        return (torch.randn(n, k, device=device).to(torch.float8_e4m3fn),), alpha
    if kind == "w8a8":
        return (_bits(n, k, device).view(torch.int8),), alpha
    if kind == "w8a16":
        return (_bits(n, -(-k // 128) * 128, device).view(torch.uint16),), alpha
    packed = _bits(n, -(-k // 128) * 64, device)
    groups = k // GROUP if k % GROUP == 0 else 0
    scale = torch.rand(groups, n, device=device).clamp(min=0.1).to(torch.float16) if groups else None
    if kind == "w4a8":
        return (packed, scale), alpha
    zero = torch.randint(0, 16, (max(groups, 1), n), dtype=torch.uint8, device=device)
    return (packed.view(torch.uint16), scale, zero), alpha * 16


def _bits(n: int, size: int, device: torch.device) -> Tensor:
    return torch.randint(0, 256, (n, size), dtype=torch.uint8, device=device)


def _column(kind: str, weights: tuple[Tensor | None, ...], k: int) -> Tensor:
    """The row sums of the integers that a kernel multiplies, for the zero points of x."""
    words, *rest = weights
    if kind == "w8a8":
        return words.sum(1, dtype=torch.int32)
    ones = torch.ones(1, k, dtype=torch.int8, device=words.device)
    parts = []
    for first in range(0, words.shape[0], PART):
        held = [None if part is None else part[:, first : first + PART].contiguous() for part in rest]
        parts.append(w4a8.sums(ones, words[first : first + PART], *held)[0])
    return torch.cat(parts).float()
