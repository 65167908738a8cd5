"""The native kernels beside what torch offers for the same work: python -m tests.benchmarks.native_kernels [--threads N]

Microseconds, medians of calls in turn. The linears have MiniLM's shapes; a call of ours includes its Python.
"""

from __future__ import annotations

import argparse
import os

import torch
from torch.nn import functional

from qpass.backends.native import build
from qpass.backends.onednn import prepack
from qpass.profit import machine
from qpass.timing import interleaved
from tests.test_native import prepared

Q, onednn = torch.ops.qpass, torch.ops.onednn
LINEARS = tuple((m, k, n) for m in (1, 16, 128, 4096) for k, n in ((384, 384), (384, 1536), (1536, 384)))
ATTENTIONS = ((1, 12, 16, 32), (1, 12, 128, 32), (32, 12, 128, 32), (1, 12, 512, 64))


def linear(m: int, k: int, n: int) -> dict[str, float]:
    """One int8 linear with GELU that writes integers, and the float linear it replaces."""
    x, weight = torch.randint(0, 256, (m, k), dtype=torch.uint8), torch.randint(-127, 128, (n, k), dtype=torch.int8)
    scale, bias, zero = torch.rand(n) * 1e-2, torch.randn(n), torch.zeros(n, dtype=torch.int32)
    packed, offset = build.pack(build.library(), weight), weight.sum(1, dtype=torch.int32) * 128
    ours = prepared(
        Q.packed_linear.default,
        x,
        packed,
        scale * 0.01,
        bias,
        offset,
        None,
        None,
        None,
        n,
        "gelu",
        0.02,
        9,
        torch.uint8,
    )
    theirs = (prepack(weight), scale, zero, bias, 0.02, 9, torch.uint8, "gelu", [], "none")
    real, floats, halves = torch.randn(m, k), weight.float(), weight.bfloat16()
    half = real.bfloat16()
    return interleaved(
        {
            "native": lambda: ours(x),
            "oneDNN": lambda: onednn.qlinear_pointwise.default(x, 0.01, 128, *theirs),
            "bf16": lambda: functional.gelu(functional.linear(half, halves)),
            "fp32": lambda: functional.gelu(functional.linear(real, floats)),
        },
        rounds=15,
    )


def attention(batch: int, heads: int, length: int, width: int) -> dict[str, float]:
    """Attention in bfloat16 with a mask, against torch's."""
    q, k, v = (torch.randn(batch, length, heads, width).bfloat16().transpose(1, 2) for _ in range(3))
    mask = torch.rand(batch, 1, 1, length) > 0.1
    mask = mask.expand(batch, 1, length, length).contiguous()
    ours = prepared(Q.attention.default, q, k, v, mask, False, width**-0.5, None, None)
    return interleaved(
        {
            "native": lambda: ours(q, k, v, mask),
            "torch": lambda: functional.scaled_dot_product_attention(q, k, v, attn_mask=mask),
        },
        rounds=15,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    torch.set_num_threads(parser.parse_args().threads)
    print(machine())
    with torch.no_grad():
        for title, function, shapes in (("linear", linear, LINEARS), ("attention", attention, ATTENTIONS)):
            for shape in shapes:
                found = function(*shape)
                times = "  ".join(f"{name} {ms * 1e3:9.1f}" for name, ms in found.items())
                print(f"{title:10s}{' x '.join(map(str, shape)):20s}{times}")


if __name__ == "__main__":
    main()
