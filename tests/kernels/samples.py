"""Random arguments of the linear ops, and what their kernels are."""

import torch

from qpass_kernels import w4a8, w4a16, w8a8, w8a16
from qpass_kernels.epilogue import Epilogue
from qpass_kernels.layouts import block_of, group_scales, pack

KINDS = {"w8a8": w8a8, "fp8": w8a8, "w8a16": w8a16, "w4a16": w4a16, "w4a8": w4a8}
OPS = {
    "w8a8": "w8a8_linear",
    "fp8": "w8a8_linear",
    "w8a16": "w8a16_linear",
    "w4a16": "w4a16_linear",
    "w4a8": "w4a8_linear",
}


def activations(kind, m, k, dtype=torch.float16):
    """x [m, k] of what a kind multiplies."""
    if kind in ("w8a8", "w4a8"):
        return torch.randint(-128, 128, (m, k), dtype=torch.int8)
    x = torch.randn(m, k)
    return x.to(torch.float8_e4m3fn) if kind == "fp8" else x.to(dtype)


def weights(kind, n, k, group=0):
    """(the op's weight arguments, float32 [n] factor for alpha, float [n] row sums of the integers)."""
    scale, top = None, torch.rand(n) + 0.5
    if group:
        scale, top = group_scales(torch.rand(n, k // group) + 0.1)
    if kind == "w8a8":
        q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        return (q,), top, q.sum(1, dtype=torch.int32)
    if kind == "fp8":
        return (torch.randn(n, k).to(torch.float8_e4m3fn),), top, None
    if kind == "w8a16":
        return (pack(torch.randint(-128, 128, (n, k)), kind),), top, None
    if kind == "w4a16":
        zero = torch.randint(0, 16, (1 if scale is None else scale.shape[0], n), dtype=torch.uint8)
        return (pack(torch.randint(0, 16, (n, k)), kind), scale, zero), top, None
    words = pack(torch.randint(-8, 8, (n, k)), kind, block_of(kind, group))
    ones = torch.ones(1, k, dtype=torch.int8)
    return (words, scale), top / 16, w4a8.sums(ones, words, scale)[0].float()


def epilogue(kind, m, n, top, column, *, everything=True, **options):
    """An epilogue for a product of m rows, with everything the kind takes or next to nothing."""
    alpha = top / (100 if kind in ("w8a8", "w4a8") else 10)
    if not everything:
        return Epilogue(alpha, **options)
    rows = {}
    if kind in ("w8a8", "w4a8"):
        rows = {"offset": column, "row_zero": torch.randint(-128, 128, (m, 1), dtype=torch.int32)}
    if kind in ("w8a8", "w4a8", "fp8"):
        rows["row_scale"] = torch.rand(m, 1) / 10
    return Epilogue(alpha, beta=torch.randn(n), other=torch.randn(m, n), **rows, **options)
