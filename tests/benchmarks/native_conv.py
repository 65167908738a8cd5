"""The native convolution against oneDNN's, each distinct shape of ResNet-50 and MobileNetV2: u8 in, relu, u8 out,
channels last.

    python -m tests.benchmarks.native_conv [--batch 1 8]

Microseconds (the two in turn, medians), multiply-adds a second, and totals weighted by how often a shape occurs.
"""

import argparse

import torch
from torch import fx
from torch._subclasses import FakeTensorMode

from qpass.backends.native.calls import kernel
from qpass.backends.native.conv_calls import conv_call
from qpass.backends.native.conv_pack import pack_conv, phase_offsets
from qpass.convolutions import Geometry
from qpass.timing import interleaved

onednn = torch.ops.onednn
# count, channels, outputs, size, kernel, stride, groups
RESNET = (
    (1, 3, 64, 224, 7, 2, 1), (1, 64, 64, 56, 1, 1, 1), (3, 64, 64, 56, 3, 1, 1), (4, 64, 256, 56, 1, 1, 1),
    (2, 256, 64, 56, 1, 1, 1), (1, 256, 128, 56, 1, 1, 1), (1, 128, 128, 56, 3, 2, 1), (3, 128, 128, 28, 3, 1, 1),
    (4, 128, 512, 28, 1, 1, 1), (1, 256, 512, 56, 1, 2, 1), (3, 512, 128, 28, 1, 1, 1), (1, 512, 256, 28, 1, 1, 1),
    (1, 256, 256, 28, 3, 2, 1), (5, 256, 256, 14, 3, 1, 1), (6, 256, 1024, 14, 1, 1, 1), (1, 512, 1024, 28, 1, 2, 1),
    (5, 1024, 256, 14, 1, 1, 1), (1, 1024, 512, 14, 1, 1, 1), (1, 512, 512, 14, 3, 2, 1), (2, 512, 512, 7, 3, 1, 1),
    (3, 512, 2048, 7, 1, 1, 1), (1, 1024, 2048, 14, 1, 2, 1), (2, 2048, 512, 7, 1, 1, 1),
)  # fmt: skip
MOBILENET = (
    (1, 3, 32, 224, 3, 2, 1), (1, 32, 32, 112, 3, 1, 32), (1, 32, 16, 112, 1, 1, 1), (1, 16, 96, 112, 1, 1, 1),
    (1, 96, 96, 112, 3, 2, 96), (1, 96, 24, 56, 1, 1, 1), (2, 24, 144, 56, 1, 1, 1), (1, 144, 144, 56, 3, 1, 144),
    (1, 144, 24, 56, 1, 1, 1), (1, 144, 144, 56, 3, 2, 144), (1, 144, 32, 28, 1, 1, 1), (3, 32, 192, 28, 1, 1, 1),
    (2, 192, 192, 28, 3, 1, 192), (2, 192, 32, 28, 1, 1, 1), (1, 192, 192, 28, 3, 2, 192), (1, 192, 64, 14, 1, 1, 1),
    (4, 64, 384, 14, 1, 1, 1), (4, 384, 384, 14, 3, 1, 384), (3, 384, 64, 14, 1, 1, 1), (1, 384, 96, 14, 1, 1, 1),
    (3, 96, 576, 14, 1, 1, 1), (2, 576, 576, 14, 3, 1, 576), (2, 576, 96, 14, 1, 1, 1), (1, 576, 576, 14, 3, 2, 576),
    (1, 576, 160, 7, 1, 1, 1), (3, 160, 960, 7, 1, 1, 1), (3, 960, 960, 7, 3, 1, 960), (2, 960, 160, 7, 1, 1, 1),
    (1, 960, 320, 7, 1, 1, 1), (1, 320, 1280, 7, 1, 1, 1),
)  # fmt: skip


def both(batch, channels, n, size, k, stride, groups):
    """(native, oneDNN): two functions of one image that give the same codes."""
    g = Geometry((k, k), (stride,) * 2, (k // 2,) * 2, (1, 1), False, (0, 0), groups)
    x = torch.randint(0, 256, (batch, size, size, channels), dtype=torch.uint8).movedim(-1, 1)
    weight = torch.randint(-127, 128, (n, channels // groups, k, k), dtype=torch.int8)
    scale, bias = torch.full((n,), 1e-3), torch.randn(n)
    packed = onednn.qconv_prepack.default(weight, scale, 0.02, 7, g.stride, g.padding, g.dilation, groups, None)
    zero = torch.zeros(n, dtype=torch.int32)
    rest = (bias, g.stride, g.padding, g.dilation, groups, 0.5, 3, torch.uint8, "relu", [], "")
    held = {"packed": pack_conv(weight, g), "alpha": scale * 0.02, "beta": bias, "offset": phase_offsets(weight, g) * 7}
    graph, module = fx.Graph(), torch.nn.Module()
    node = graph.placeholder("x")
    node.meta["val"] = FakeTensorMode().from_tensor(x)
    constants = []
    for name, value in held.items():
        module.register_buffer(name, value)
        constants.append(graph.get_attr(name))
    walk = ([k, k], list(g.stride), list(g.padding), [1, 1], False, [0, 0], groups)
    args = (node, *constants, None, None, None, None, 1.0, 0, n, *walk, 7, "relu", 0.5, 3, 255, torch.uint8)
    call = graph.call_function(torch.ops.qpass.packed_conv.default, args)
    gm = fx.GraphModule(module, graph)
    run, _ = conv_call(call)
    keep = (gm, held)
    native = lambda keep=keep: run(x, None, None, None)
    other = lambda: onednn.qconv2d_pointwise.default(x, 0.02, 7, packed, scale, zero, *rest)
    difference = (native().int() - other().int()).abs().max()
    assert int(difference) <= 1, f"the two differ by {int(difference)}"
    return native, other


def main():
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(2)
    kernel("qpass_conv")
    for name, shapes in (("ResNet-50", RESNET), ("MobileNetV2", MOBILENET)):
        if options.only and options.only != name:
            continue
        for batch in options.batch:
            totals = [0.0, 0.0]
            print(
                f"\n{name}, batch {batch}\n\n"
                "| x | channels -> outputs, size, kernel/stride, groups | native us | GMAC/s | oneDNN us | GMAC/s |"
            )
            print("|---|---|---|---|---|---|")
            for count, channels, n, size, k, stride, groups in shapes:
                calls = both(batch, channels, n, size, k, stride, groups)
                laps = interleaved(dict(zip(("native", "oneDNN"), calls, strict=True)), rounds=15, burst=2)
                times = [t * 1e3 for t in laps.values()]
                macs = batch * (size // stride) ** 2 * n * k * k * channels // groups
                totals = [total + count * t for total, t in zip(totals, times, strict=True)]
                cells = " | ".join(f"{t:.0f} | {macs / t / 1e3:.0f}" for t in times)
                print(f"| {count} | {channels} -> {n}, {size}, {k}/{stride}, {groups} | {cells} |", flush=True)
            print(
                f"\ntotal: native {totals[0] / 1e3:.2f} ms, oneDNN {totals[1] / 1e3:.2f} ms, "
                f"ratio {totals[0] / totals[1]:.2f}"
            )


if __name__ == "__main__":
    main()
