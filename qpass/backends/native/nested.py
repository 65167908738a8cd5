"""Linears on nested weights: the kernels of stored weights of 4 bits (stored.py), once or twice, at the bits of now.

4 bits    stored(x, h)                                    half of the bytes
8 bits    stored(x, l) + stored(x, h)                     all of them, in two goes
2 bits    stored(x, halves of q)                          a quarter, written out as codes of 4 bits at each call

up to FEW rows    every code is multiplied as it is read
more              the weight is written out in the input's type, once a call, and torch multiplies
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.nn import functional

from qpass.backends.native.arguments import OUT_TYPES
from qpass.backends.native.build import library, unavailable
from qpass.backends.native.calls import Call, kernel
from qpass.backends.native.stored import FEW, FLOATS, STORED
from qpass.graphs import add_call, add_constant, constant
from qpass.nested import FEW as TWO
from qpass.nested import plane, type_at, unquartered
from qpass.nested_ops import bits_now, nested_linear, nested_linear_fake
from qpass.nested_words import HALF
from qpass.ops import define
from qpass.qtype import QType

Q = torch.ops.qpass

define(
    "stored_nested(Tensor x, Tensor planes, Tensor scale, Tensor zero, Tensor bits, str type, Tensor? bias, "
    "ScalarType dtype) -> Tensor",
    nested_linear,
    nested_linear_fake,
)


def why_not(node: fx.Node) -> str | None:
    """None where the kernels run a nested linear, or why not."""
    if unavailable() is not None:
        return unavailable()
    if not hasattr(library(), "qpass_stored"):
        return "this processor lacks avx512_bf16"
    x, planes, scale, zero, _, text, bias, dtype = node.args
    if x.meta["val"].dtype not in FLOATS or dtype not in FLOATS:
        return "the kernel reads and writes float32 and bfloat16"
    if any(constant(held) is None for held in (planes, scale, zero)) or (bias is not None and constant(bias) is None):
        return "its weight, scale or bias is no constant of the graph"
    group = QType.parse(text).group
    return None if group is None or group % 64 == 0 or group == 32 else f"groups of {group}"


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """One qpass.stored_nested in front of `node`, on the stored planes themselves; the bits stay an input."""
    x, planes, scale, zero, bits, text, bias, dtype = node.args
    name = node.meta.get("site", "linear")
    kept = {"planes": planes, "scale": scale, "zero": zero, "bias": bias}
    held = {
        key: None if each is None else add_constant(gm, f"{name}_{key}", constant(each).detach(), node)
        for key, each in kept.items()
    }
    args = (x, held["planes"], held["scale"], held["zero"], bits, text, held["bias"], dtype)
    return add_call(gm, Q.stored_nested.default, args, node)


def nested_call(node: fx.Node) -> Call:
    """A call of qpass.stored_nested, of a float input and of the bits."""
    x, planes, scale, zero, bits, text, bias, dtype = node.args
    weight = Weight(QType.parse(text), *(constant(t).detach().contiguous() for t in (planes, scale, zero)))
    beta = None if bias is None else constant(bias).detach().float().contiguous()
    few = FEW[x.meta["val"].dtype]

    def run(x: Tensor, bits: Tensor) -> Tensor:
        width, x = bits_now(bits), x.contiguous()
        if x.numel() // weight.k > few:
            y = functional.linear(x, weight.real(width, x.dtype), None if beta is None else beta.to(x.dtype))
            return y.to(dtype)
        if width <= HALF:
            return weight.times(x, width, beta, None, dtype)
        return weight.times(x, width, beta, weight.times(x, HALF, None, None, torch.float32), dtype)

    return run, (x, bits)


class Weight:
    """A nested weight as the kernels read it: planes, scales and zero points stay where they are."""

    def __init__(self, qtype: QType, planes: Tensor, scale: Tensor, zero: Tensor) -> None:
        self.type, self.planes, self.scale, self.zero = qtype, planes, scale, zero
        self.n, self.k = planes.shape[1], 4 * planes.shape[2]
        self.group = type_at(qtype, HALF).group or self.k
        self.launch, self.expand = kernel("qpass_stored"), kernel("qpass_expand")

    def halves(self, bits: int) -> Tensor:
        """What a width reads of its own, two codes a byte."""
        data = plane(self.planes, self.type, bits)
        return unquartered(data) if bits == TWO else data

    def _read(self, bits: int, data: Tensor) -> tuple[int, int, int]:
        row = self.type.widths.index(bits)
        return data.data_ptr(), self.scale[row].data_ptr(), self.zero[row].data_ptr()

    def times(self, x: Tensor, bits: int, bias: Tensor | None, other: Tensor | None, dtype: torch.dtype) -> Tensor:
        """X @ w.T + bias + other [..., N], w what `bits` reads of its own."""
        data, out = self.halves(bits), torch.empty((*x.shape[:-1], self.n), dtype=dtype)
        beta, addend = (0 if t is None else t.data_ptr() for t in (bias, other))
        pointers = (*self._read(bits, data), x.data_ptr(), beta, addend, out.data_ptr(), 0, 0)
        sizes = (x.numel() // self.k, self.n, self.k, self.group)
        types = (0, 0, 0, OUT_TYPES[x.dtype], OUT_TYPES[dtype], OUT_TYPES[torch.float32], 0, torch.get_num_threads())
        self.launch(STORED.pack(*pointers, *sizes, *types))
        return out

    def real(self, bits: int, dtype: torch.dtype) -> Tensor:
        """The weight [N, K] at a width; of 8 bits the sum of two in float32, rounded once."""
        if bits > HALF:
            return self._part(bits, torch.float32).add_(self._part(HALF, torch.float32)).to(dtype)
        return self._part(bits, dtype)

    def _part(self, bits: int, dtype: torch.dtype) -> Tensor:
        data, out = self.halves(bits), torch.empty((self.n, self.k), dtype=dtype)
        pointers = (*self._read(bits, data), 0, 0, 0, out.data_ptr(), 0, 0)
        types = (0, 0, 0, 0, OUT_TYPES[dtype], 0, 0, torch.get_num_threads())
        self.expand(STORED.pack(*pointers, 0, self.n, self.k, self.group, *types))
        return out


CALLS = ((Q.stored_nested.default, nested_call),)
