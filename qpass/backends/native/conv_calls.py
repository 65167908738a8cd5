"""From a convolution in a lowered graph to the Python function that calls its kernel (see calls.py).

Where codes follow without, or with relu or relu6, the output's scale and zero point become part of alpha and beta, and the
activation a tighter clamp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import CONV, CONV_ACTIVATIONS, OUT_TYPES
from qpass.backends.native.conv_ops import out_sizes
from qpass.backends.native.conv_pack import layout, merged, unpack_conv
from qpass.backends.native.images import channels_last, strides, three
from qpass.graphs import constant

STRAIGHT = {"": math.inf, "relu": math.inf, "relu6": 6.0}  # the largest value of an activation that is a clamp


@dataclass(frozen=True)
class Geometry:
    """What the sizes of a convolution follow from; the lists have one entry for each spatial axis."""

    n: int
    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    transposed: bool
    output_padding: list[int]
    groups: int

    def sizes(self, x: torch.Size) -> tuple[tuple[int, ...], list[int]]:
        """Shape of the output, and the sizes in the argument block."""
        batch, channels, *spatial = x
        out = out_sizes(
            spatial, self.kernel, self.stride, self.padding, self.dilation, self.transposed, self.output_padding
        )
        lists = ((spatial, 1), (out, 1), (self.kernel, 1), (self.stride, 1), (self.padding, 0), (self.dilation, 1))
        flat = [v for values, filler in lists for v in three(values, filler)]
        merges = 1 if channels == self.n == self.groups else merged(self.n // self.groups, self.groups)
        return (batch, self.n, *out), [batch, channels, self.n, self.groups // merges, *flat]


def conv_call(node: fx.Node, kernel: Callable[[str], Callable[[bytes], None]]) -> tuple[Callable[..., Any], tuple]:
    """A call of qpass.packed_conv; kernel: a function of the library by its name."""
    (x, packed, alpha, beta, offset, slope, scale, zero, other, other_scale, other_zero) = node.args[:11]
    geometry, (x_zero, act, out_scale, out_zero, out_max, dtype) = Geometry(*node.args[11:19]), node.args[19:]
    channels = int(x.meta["val"].shape[1])
    how = layout(
        channels // geometry.groups,
        geometry.n // geometry.groups,
        geometry.kernel,
        geometry.groups,
        geometry.transposed,
    )
    launch = kernel("qpass_depthwise" if how == "depthwise" else "qpass_conv")
    values = [constant(c) for c in (alpha, beta)]
    clamped = dtype is torch.uint8 and act in STRAIGHT
    clamped = clamped and (other is None or other.meta["val"].dtype is torch.uint8)
    low, high = 0, out_max
    if clamped:
        values = _scaled(values, 0.0 if other is None else other_scale * other_zero, out_scale, out_zero)
        other_scale /= out_scale
        low, high = _range(act, out_scale, out_zero, out_max)
    offsets = constant(offset)
    if geometry.transposed and how != "depthwise":
        offsets = phase_offsets(constant(packed), offsets, channels, geometry, 1 if scale is not None else x_zero)
    held = [constant(packed), *values, offsets, None if slope is None else constant(slope).float()]
    held = [None if t is None else t.detach().contiguous() for t in held]
    addresses = tuple(0 if t is None else t.data_ptr() for t in held)
    known: dict[Any, tuple] = {}
    kind = 0 if other is None else OUT_TYPES[other.meta["val"].dtype]

    def sized(shape: torch.Size, threads: int) -> tuple:
        out, sizes = geometry.sizes(shape)
        ints = (int(geometry.transposed), int(how == "folded"), x_zero, CONV_ACTIVATIONS.index(act), OUT_TYPES[dtype])
        ints = (*ints, kind, threads, int(clamped), low, high)
        floats = (1 / out_scale, float(out_zero), other_scale, float(other_zero))
        return out, strides(out), strides(shape), (*sizes, *ints, *floats)

    def run(x: Tensor, scale: Tensor | None, zeros: Tensor | None, other: Tensor | None, *, held=held) -> Tensor:
        key = (x.shape, torch.get_num_threads())
        if key not in known:
            known[key] = sized(*key)
        shape, out_strides, x_strides, tail = known[key]
        if x.stride() != x_strides:
            x = channels_last(x)
        out = torch.empty_strided(shape, out_strides, dtype=dtype)
        sample = samples = addend = 0
        if scale is not None and zeros is not None:
            scale, zeros = scale.contiguous(), zeros.contiguous()
            sample, samples = scale.data_ptr(), zeros.data_ptr()
        if other is not None:
            if other.stride() != out_strides:
                other = channels_last(other)
            addend = other.data_ptr()
        launch(CONV.pack(x.data_ptr(), *addresses, sample, samples, addend, out.data_ptr(), *tail))
        return out

    return run, (x, scale, zero, other)


def _scaled(values: list[Tensor], shift: float, scale: float, zero: int) -> list[Tensor]:
    alpha, beta = (v.double() for v in values)
    return [(alpha / scale).float(), ((beta - shift) / scale + zero).float()]


def _range(act: str, scale: float, zero: int, highest: int) -> tuple[int, int]:
    """The least and the largest code of an activation in STRAIGHT."""
    low = min(max(zero, 0), highest) if act else 0
    return low, int(max(low, min(highest, round(min(STRAIGHT[act] / scale, 1e6)) + zero)))


def phase_offsets(packed: Tensor, offset: Tensor, channels: int, geometry: Geometry, zero: int) -> Tensor:
    """int32 [phases, N]: the offset without the share of the taps that outputs of a phase do not have, times zero.

    Output o of an axis reads input (o + padding - tap * dilation) / stride, where that is whole; phase: o modulo stride.
    """
    g = geometry
    weight = unpack_conv(packed, channels, g.n, g.kernel, g.groups, True).flatten(0, 1).sum(1, dtype=torch.int64)
    rows = []
    for phase in itertools.product(*(range(s) for s in g.stride)):
        missing = torch.ones(g.kernel, dtype=torch.int64)
        for index in itertools.product(*(range(k) for k in g.kernel)):
            axes = zip(phase, index, g.stride, g.padding, g.dilation, strict=True)
            missing[index] = any((o + p - k * d) % s for o, k, s, p, d in axes)
        rows.append(offset - zero * (weight * missing).flatten(1).sum(1))
    return torch.stack(rows).to(torch.int32)
