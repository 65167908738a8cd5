"""The image in front of the first convolution: quantized and laid out channels last by one kernel.

    qpass.quantize(x float32 [B, C, *spatial], u8/t)   ->   qpass.image_codes(x)

1. few channels, in planes one behind the other, as images come; scale and zero point are constants;
2. only convolutions of ours read the codes.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from qpass import affine
from qpass.backends.native.arguments import IMAGE
from qpass.backends.native.build import unavailable
from qpass.backends.native.calls import Call, kernel
from qpass.backends.native.conv_calls import empty_image
from qpass.backends.native.conv_ops import channels_last
from qpass.backends.native.conv_pack import FEW
from qpass.graphs import add_call, constant
from qpass.ops import define
from qpass.qtype import QType

Q = torch.ops.qpass


def image_codes(x: Tensor, scale: float, zero: int, bits: int) -> Tensor:
    """Q = clamp(round(x / scale) + zero, 0, 2^bits - 1), u8 [B, C, *spatial], channels last. x: float32."""
    values = torch.tensor(scale), torch.tensor(zero, dtype=torch.int32)
    return channels_last(affine.quantize(x, *values, QType.parse(f"u{bits}/t")))


def _image_codes_fake(x, scale, zero, bits):
    return x.new_empty((x.shape[0], *x.shape[2:], x.shape[1]), dtype=torch.uint8).movedim(-1, 1)


define("image_codes(Tensor x, float scale, int zero, int bits) -> Tensor", image_codes, _image_codes_fake)


def why_not(node: fx.Node) -> str | None:
    """None where a quantize of a lowered graph is one of an image, or why it is not."""
    if unavailable() is not None:
        return unavailable()
    scale, zero, kind = node.args[1:4]
    if not (kind.startswith("u") and kind.endswith("/t")) or constant(scale) is None or constant(zero) is None:
        return "its type is not unsigned, per tensor and constant"
    x: Any = node.args[0].meta["val"]
    if x.dtype is not torch.float32 or x.dim() < 3 or not isinstance(x.shape[1], int) or not 0 < x.shape[1] < FEW:
        return "it reads no float32 image of few channels"
    if not x.is_contiguous():
        return "its image is laid out in another order"
    return None if all(user.target is Q.packed_conv.default for user in node.users) else "not only convolutions read it"


def absorb_images(gm: fx.GraphModule) -> int:
    """Makes each quantize of an image one call; returns their number."""
    found = [n for n in gm.graph.nodes if n.target is Q.quantize.default and why_not(n) is None]
    for node in found:
        scale, zero = (float(constant(node.args[i])) for i in (1, 2))
        bits = QType.parse(node.args[3]).qmax.bit_length()
        made = add_call(gm, Q.image_codes.default, (node.args[0], scale, int(zero), bits), node)
        made.meta |= {key: node.meta[key] for key in ("site", "rule") if key in node.meta}
        node.replace_all_uses_with(made)
    gm.graph.eliminate_dead_code()
    return len(found)


class ImageBlock:
    """The argument block of one qpass.image_codes but for what a call brings."""

    def __init__(self, node: fx.Node) -> None:
        x, scale, zero, bits = node.args
        self.axes = x.meta["val"].dim() - 2
        self._tail = (scale, float(zero), float(2**bits - 1))

    def pack(self, shape, threads: int, x: int = 0, out: int = 0) -> bytes:
        """shape: of x. x, out: addresses."""
        return IMAGE.pack(x, out, shape[0], shape[1], math.prod(shape[2:]), threads, *self._tail)


def image_call(node: fx.Node) -> Call:
    """A call of qpass.image_codes."""
    block, launch = ImageBlock(node), kernel("qpass_image")
    empty, threads = empty_image(block.axes), torch.get_num_threads

    def run(x: Tensor) -> Tensor:
        x = x.contiguous()
        out = empty(x.shape, torch.uint8)
        launch(block.pack(x.shape, threads(), x.data_ptr(), out.data_ptr()))
        return out

    return run, (node.args[0],)


CALLS = ((Q.image_codes.default, image_call),)
