"""The cpu backend: integers through our own AVX-512 kernels, or through oneDNN, and the rest as generated kernels.

    what                     AVX-512 VNNI           else
    qpass.linear             qpass.packed_linear    onednn.qlinear_pointwise
      with a float input     qpass.stored_linear      a generated dequantize and a float product
      weights in groups      qpass.stored_linear      the reference
    qpass.conv               qpass.packed_conv      onednn.qconv_pointwise
    quantize of an image     qpass.image_codes      a generated kernel
    attention in bfloat16    qpass.attention        two bmm and a generated softmax
    pointwise, reductions    one generated kernel a region

A processor with AMX multiplies large integer products on oneDNN's AMX kernels and has our own for the rest. A sum of
255 * 127 products of u8 and s8 is exact in the int32 accumulator of VNNI and AMX for K up to 66,000. A processor without
either adds products in pairs in 16 bits first (vpmaddubsw), which is exact where no pair is beyond 32,767: inputs of 7 bits
(w8a7) or weights of 7 (w7a8). Other products of integers stay with their reference there, and say so.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qpass.backends import Backend, attention, native, onednn, onednn_conv, unfused
from qpass.backends.emit import emit
from qpass.backends.in_range import check_lookups
from qpass.backends.inductor import compile_region
from qpass.backends.laid_out import laid_out_calls
from qpass.backends.native import conv_lower, image, stored
from qpass.backends.native import lower as native_lower
from qpass.backends.native.absorb import absorb as absorb_quantizes
from qpass.backends.native.calls import native_calls
from qpass.backends.native.chain import join_chains
from qpass.backends.native.conv_calls import CALLS as CONV_CALLS
from qpass.backends.regions import extract, find_regions, replace_regions, signature
from qpass.graphs import constant
from qpass.qtype import QType

aten = torch.ops.aten
Q = torch.ops.qpass

NAME = "cpu"
LARGEST_K = (2**31 - 1) // (255 * 127)
LARGEST_PAIR = 2**15 - 1
WEIGHTS = ("i8/t", *(f"i{bits}/c0" for bits in range(2, 9)))  # held in int8: fewer bits are smaller integers
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def saturates() -> bool:
    """Whether u8 x s8 products saturate in pairs on this processor: x86 with neither VNNI nor AMX."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    cpu = torch.cpu
    return not (cpu._is_vnni_supported() or cpu._is_amx_tile_supported())


def why_not_exact(node: fx.Node) -> str | None:
    """None where pairs of products do not saturate, of a fused op that reads codes, or which do."""
    read, weight = QType.parse(node.meta.get("codes", node.args[3])), QType.parse(node.args[6])
    largest = 2 * read.qmax * max(weight.qmax, -weight.qmin)
    if not saturates() or largest <= LARGEST_PAIR:
        return None
    return (
        f"this processor has neither VNNI nor AMX, and sums of two {read} x {weight} products would saturate; with inputs "
        "or weights of 7 bits (w8a7, w7a8) none does"
    )


def why_not_linear(node: fx.Node) -> str | None:
    """None where this backend can run a fused linear, or the sentence that says why not."""
    x_type, weight_type, data = node.args[3], node.args[6], node.args[4]
    if not _of_integers(node) and stored.why_not(node) is None:
        return None
    if node.args[14] is not None and not x_type:
        return None if not node.args[12] else "a weight with zero points is multiplied in float"
    if x_type not in ("u8/t", "u8/token", ""):
        return f"the cpu backend multiplies inputs of u8/t or u8/token, not {x_type}"
    if weight_type not in WEIGHTS:
        return f"the cpu backend multiplies weights of i2/c0 to i8/c0 or i8/t, not {weight_type}"
    if constant(data) is None:
        return "its weight is not a constant of the graph"
    if not x_type:
        return native_lower.why_not_linear(node) if node.args[12] else None
    if constant(data).shape[1] > LARGEST_K:
        return f"its {constant(data).shape[1]} inputs could overflow the int32 accumulator (at most {LARGEST_K})"
    if node.args[12] and node.args[12] != "u8/t":
        return f"the cpu backend writes u8/t, not {node.args[12]}"
    return why_not_exact(node)


def _of_integers(node: fx.Node) -> bool:
    """Whether a fused linear is one sum of integers for each output, to be scaled once."""
    return bool(node.args[3]) and node.args[6] in WEIGHTS and node.args[14] is None


def has_amx() -> bool:
    """Whether oneDNN multiplies integers in AMX tiles here, eight times as fast as VNNI does."""
    return torch.cpu._is_amx_tile_supported()


def lower_linear(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute a fused linear, in front of `node`; returns the last."""
    if not _of_integers(node) and stored.why_not(node) is None:
        return stored.lower(gm, node)
    if node.args[14] is not None or (not node.args[3] and native_lower.why_not_linear(node)):
        return unfused.lower_linear(gm, node)
    if (has_amx() and node.args[3]) or native_lower.why_not_linear(node):
        return onednn.lower_linear(gm, node)
    return native_lower.lower_linear(gm, node)


def why_not_attention(node: fx.Node) -> str | None:
    """None where attention is better on a kernel of this backend, or why torch's stays."""
    return attention.why_not(node) if native_lower.why_not_attention(node) else None


def lower_attention(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute attention, in front of `node`; returns the last."""
    if native_lower.why_not_attention(node):
        return attention.lower_attention(gm, node)
    return native_lower.lower_attention(gm, node)


def why_not_conv(node: fx.Node) -> str | None:
    """None where this backend can run a fused convolution, or the sentence that says why not."""
    native_says = conv_lower.why_not_conv(node)
    if native_says is None:
        return None
    return native_says if onednn_conv.why_not(node) else why_not_exact(node)


def lower_conv(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """The nodes that compute a fused convolution, in front of `node`; returns the last."""
    bounds = node.args[12] == "cap"  # of channels: no post-op of oneDNN
    if conv_lower.why_not_conv(node) or (has_amx() and not bounds and onednn_conv.why_not(node) is None):
        return onednn_conv.lower_conv(gm, node)
    return conv_lower.lower_conv(gm, node)


def absorb(gm: fx.GraphModule) -> int:
    """Quantizes as part of the kernel in front of them, or as one that lays an image out too; returns their number."""
    return absorb_quantizes(gm) + image.absorb_images(gm)


KERNELS: dict[str, Callable[..., Any]] = {}  # of this process: another capture or model finds them by signature


def finish(gm: fx.GraphModule) -> Callable[..., Any]:
    """The lowered graph as one Python function: kernels of ours and of oneDNN, and a generated one for each region."""
    keep_pages()
    check_lookups(gm)
    wanted: list[str] = []
    regions = find_regions(gm)
    for region in regions:
        part = extract(gm, region)
        wanted.append(signature(part))
        if wanted[-1] not in KERNELS:
            KERNELS[wanted[-1]] = compile_region(part)
    nodes = replace_regions(gm, regions)
    calls = {}
    if native.unavailable() is None:
        join_chains(gm)
        calls = native_calls(gm, (*CONV_CALLS, *image.CALLS, *stored.CALLS))
    calls |= {node: (KERNELS[key], node.args) for node, key in zip(nodes, wanted, strict=True)}
    return emit(gm, calls | laid_out_calls(gm, calls))


@functools.cache
def keep_pages() -> None:
    """Asks glibc to keep freed buffers instead of returning them to the kernel, for this process.

    By default every buffer over 32 MB, and the top of the heap, goes back at once, and the next call faults each page in
    again: MiniLM at 32 x 128 takes 504 ms so and 322 ms with this (one core). Other allocators are left as they are.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((M_MMAP_THRESHOLD, 1 << 30), (M_TRIM_THRESHOLD, (1 << 31) - 1)):
            mallopt(option, value)


def unavailable() -> str | None:
    """None where this backend runs on this machine."""
    if not torch.backends.mkldnn.is_available():
        return "this build of torch has no oneDNN"
    return None


LOWERINGS = (
    (Q.linear.default, why_not_linear, lower_linear),
    (Q.conv.default, why_not_conv, lower_conv),
    (Q.max_pool.default, conv_lower.why_not_max_pool, conv_lower.lower_max_pool),
    (aten.scaled_dot_product_attention.default, why_not_attention, lower_attention),
)
TARGETS = tuple(target for target, _, _ in LOWERINGS)


def why_not(node: fx.Node) -> str | None:
    """None where this backend can run a node of TARGETS, or the sentence that says why not."""
    return next(check(node) for target, check, _ in LOWERINGS if target is node.target)


def lower(gm: fx.GraphModule, node: fx.Node) -> fx.Node:
    """What computes a node of TARGETS here."""
    return next(build(gm, node) for target, _, build in LOWERINGS if target is node.target)


CHANNELS_LAST = (*onednn_conv.CALLS, *(target for target, _ in CONV_CALLS))
BACKEND = Backend(
    NAME,
    unavailable,
    why_not,
    lower,
    TARGETS,
    absorb,
    finish,
    lambda: CHANNELS_LAST,
    (Q.packed_conv.default,),
    weight_bits=lambda: 7 if saturates() else 8,
)
