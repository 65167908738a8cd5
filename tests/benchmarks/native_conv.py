"""Native int8 convolutions beside oneDNN's: python -m tests.benchmarks.native_conv [--threads N] [--batch N] [--model NAME]

Every distinct convolution of ResNet-50 and MobileNetV2 at 224 x 224, u8 in, u8 out, relu, channels-last: medians of calls in
turn, summed as often as the network has each. The last row runs all of the network's convolutions one after another, each
with its own weights, as a forward pass does. A call of ours includes its Python.
"""

from __future__ import annotations

import argparse
import os
from collections import Counter

import torch

from qpass.backends.native.conv_pack import pack_conv
from qpass.backends.native.images import channels_last
from qpass.profit import machine
from qpass.timing import interleaved
from tests.test_native import prepared

Q, onednn = torch.ops.qpass, torch.ops.onednn

Shape = tuple[int, int, int, int, int, int]  # input size, channels, outputs, kernel, stride, groups


def resnet50() -> list[Shape]:
    shapes, c, size = [(224, 3, 64, 7, 2, 1)], 64, 56
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shapes += [(size, c, width, 1, 1, 1), (size, width, width, 3, stride, 1)]
            if not block:
                shapes.append((size, c, 4 * width, 1, stride, 1))
            size, c = size // stride, 4 * width
            shapes.append((size, width, c, 1, 1, 1))
    return shapes


def mobilenet_v2() -> list[Shape]:
    shapes, c, size = [(224, 3, 32, 3, 2, 1)], 32, 112
    rows = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))
    for factor, n, blocks, first in rows:
        for block in range(blocks):
            stride, width = first if not block else 1, c * factor
            if factor > 1:
                shapes.append((size, c, width, 1, 1, 1))
            shapes.append((size, width, width, 3, stride, width))
            size = size // stride
            shapes.append((size, width, n, 1, 1, 1))
            c = n
    return [*shapes, (size, 320, 1280, 1, 1, 1)]


MODELS = {"ResNet-50": resnet50, "MobileNetV2": mobilenet_v2}


def products(shape: Shape, batch: int) -> float:
    """Billions of multiply-adds."""
    size, c, n, kernel, stride, groups = shape
    return batch * (-(-size // stride)) ** 2 * n * c // groups * kernel * kernel / 1e9


def calls(shape: Shape, batch: int):
    """The convolution on our kernel and on oneDNN's, without arguments."""
    size, c, n, kernel, stride, groups = shape
    axes = [[v, v] for v in (kernel, stride, kernel // 2, 1)]
    x = channels_last(torch.randint(0, 256, (batch, c, size, size), dtype=torch.uint8))
    weight = torch.randint(-127, 128, (n, c // groups, kernel, kernel), dtype=torch.int8)
    scale, bias = torch.rand(n) * 1e-2, torch.randn(n)
    offset = weight.flatten(1).sum(1, dtype=torch.int32) * 128
    tail = (n, *axes, False, [], groups, 128, "relu", 0.02, 9, 255, torch.uint8)
    constants = (pack_conv(weight, groups, False), scale * 0.01, bias, offset)
    ours = prepared(Q.packed_conv.default, x, *constants, None, None, None, None, 1.0, 0, *tail)
    kernel_of = (*axes[1:], groups)
    theirs = onednn.qconv_prepack(weight, scale, 0.01, 128, *kernel_of, list(x.shape))
    zeros = torch.zeros(n, dtype=torch.int32)
    rest = (theirs, scale, zeros, bias, *kernel_of, 0.02, 9, torch.uint8, "relu", [], "")
    return (lambda: ours(x)), (lambda: onednn.qconv2d_pointwise.default(x, 0.01, 128, *rest))


def report(name: str, batch: int, rounds: int) -> None:
    shapes = MODELS[name]()
    total = [0.0, 0.0]
    print(f"\n{name}, batch {batch}: input, channels, outputs, kernel, stride, groups; times; us and GMAC/s")
    for shape, times in Counter(shapes).items():
        native, theirs = calls(shape, batch)
        found = interleaved({"native": native, "oneDNN": theirs}, rounds=rounds)
        speeds = [products(shape, batch) / found[key] * 1e3 for key in found]
        total = [t + times * v for t, v in zip(total, found.values(), strict=True)]
        columns = "".join(f"{found[key] * 1e3:10.1f}{speed:7.0f}" for key, speed in zip(found, speeds, strict=True))
        print(f"{shape!s:30s}{times:3d}{columns}{found['native'] / found['oneDNN']:7.2f}", flush=True)
    work = sum(products(s, batch) for s in shapes)
    line(f"sum of {work:.2f} GMAC", total, work)
    chain = list(zip(*(calls(shape, batch) for shape in shapes), strict=True))
    found = interleaved(
        {key: (lambda run=run: [c() for c in run]) for key, run in zip(("native", "oneDNN"), chain, strict=True)},
        rounds=rounds,
    )
    line("one after another", list(found.values()), work)


def line(title: str, times: list[float], work: float) -> None:
    columns = "".join(f"{t * 1e3:10.1f}{work / t * 1e3:7.0f}" for t in times)
    print(f"{title:33s}{columns}{times[0] / times[1]:7.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(machine())
    with torch.no_grad():
        for name in args.model or MODELS:
            for batch in args.batch or (1, 8):
                report(name, batch, args.rounds)


if __name__ == "__main__":
    main()
