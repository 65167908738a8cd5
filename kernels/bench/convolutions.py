"""Layers of ResNet-50 and the depthwise ones of MobileNetV2, int8 codes in and out, beside torch's in bfloat16."""

from __future__ import annotations

import functools

import torch
from torch.nn import functional

from bench.cases import Ready
from qpass_kernels import conv, layers, samples, timing
from qpass_kernels import pool as pools
from qpass_kernels.configs import rule
from qpass_kernels.launch import chip_of
from qpass_kernels.layers import Layer
from qpass_kernels.measured import known
from qpass_kernels.trial import described

BATCH = 32
LAYERS = (*layers.RESNET50, *layers.DEPTHWISE)
POOLS = (Layer(64, 64, 3, 2, 112, 64),)  # the window of one, of each channel alone
DRY_LAYERS = (Layer(3, 8, 3, 2, 9), Layer(8, 16, 1, 1, 5), Layer(8, 8, 3, 1, 6, 8))
DRY_POOLS = (Layer(8, 8, 3, 2, 7, 8),)
LOOSE = 0.02  # error of the plain path, as a part of the mean square


def operations(layer: Layer, batch: int) -> float:
    """Of a layer on so many images."""
    m, n, _, _ = layers.product(layer, batch)
    return 2.0 * m * n * layer.groups * layer.kernel**2 * (layer.c // layer.groups)


def ours(layer: Layer, batch: int, device: torch.device) -> Ready:
    """Our kernel: int8 in, relu, int8 out, both channels last. Error in steps of a code, from float64, at most one."""
    sample = layers.images(layer, batch, device)
    config, note = None, "one rule"
    if not layer.is_depthwise:
        m, n, c, k = layers.product(layer, batch)
        if layer.is_matmul:
            found = known("w8a8", m, n, k, chip_of(device)) or rule("w8a8", m, n, k, chip_of(device))
            note = f"as a matmul of pixels: {described(found)}"
        else:
            config = conv.chosen(m, n, c, layer.window, layer.groups, chip_of(device))
            note = described(config)
    y = sample.run(config)
    moved = sum(t.nbytes for t in (sample.x, y, *sample.weights) if t is not None)
    some = sorted({0, batch - 1})

    def judge() -> tuple[float, float]:
        return sample.steps_off(sample.run(config), some), 1.0

    copies = sample.copies(timing.copies_of(moved, device))
    return Ready([functools.partial(s.run, config) for s in copies], moved, "int8", judge, note)


def plain(layer: Layer, batch: int, device: torch.device, dtype: torch.dtype) -> Ready:
    """What torch has: F.conv2d with a bias on channels-last images, without the relu."""
    like = {"device": device, "dtype": dtype}
    last = torch.channels_last
    x = torch.randn(batch, layer.c, layer.size, layer.size, **like).contiguous(memory_format=last)
    deep = layer.c // layer.groups
    weight = torch.randn(layer.n, deep, layer.kernel, layer.kernel, **like) / (deep * layer.kernel**2) ** 0.5
    weight, bias = weight.contiguous(memory_format=last), torch.randn(layer.n, **like)
    run = lambda x, weight: functional.conv2d(  # noqa: E731
        x, weight, bias, layer.stride, layer.kernel // 2, 1, layer.groups
    )
    moved = sum(t.nbytes for t in (x, weight, run(x, weight)))

    def judge() -> tuple[float, float]:
        some = sorted({0, batch - 1})
        wide = [t.double() for t in (x[some], weight, bias)]
        true = functional.conv2d(*wide, layer.stride, layer.kernel // 2, 1, layer.groups)
        return samples.errors(run(x, weight)[some], true)[1], LOOSE

    pairs = [(x, weight), *((x.clone(), weight.clone()) for _ in range(timing.copies_of(moved, device) - 1))]
    return Ready([functools.partial(run, *pair) for pair in pairs], moved, "bf16", judge)


def pool_name(layer: Layer) -> str:
    """A max pool by its window: `max pool of 64, 3x3/2 at 112`."""
    return f"max pool of {layer.c}, {layer.kernel}x{layer.kernel}/{layer.stride} at {layer.size}"


def pool(layer: Layer, batch: int, device: torch.device, dtype: torch.dtype) -> Ready:
    """A max pool of channels-last images: our kernel of int8 codes, or torch's of floats. Both are exact."""
    ours = dtype == torch.int8
    shape = batch, layer.c, layer.size, layer.size
    x = torch.randint(-128, 128, shape, dtype=torch.int8, device=device) if ours else torch.randn(shape, device=device)
    x = x.to(dtype).contiguous(memory_format=torch.channels_last)
    half = layer.kernel // 2
    run = (
        functools.partial(pools.pool, window=layer.window, ceil_mode=False)
        if ours
        else functools.partial(functional.max_pool2d, kernel_size=layer.kernel, stride=layer.stride, padding=half)
    )
    moved = x.nbytes + run(x).nbytes

    def judge() -> tuple[float, float]:
        true = functional.max_pool2d(x.double(), layer.kernel, layer.stride, half)
        return float((run(x).double() - true).abs().max()), 0.0

    copies = [x, *(x.clone() for _ in range(timing.copies_of(moved, device) - 1))]
    return Ready([functools.partial(run, held) for held in copies], moved, "", judge)
