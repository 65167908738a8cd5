"""From a node of a lowered graph to the Python function that calls its kernel: what never changes is filled in once."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import ACTIVATIONS, ATTENTION, LINEAR, MASKS, NORM, OUT_TYPES
from qpass.backends.native.build import library
from qpass.backends.native.views import heads_of
from qpass.graphs import constant

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # what runs, and the arguments of the node it is given


@functools.cache
def kernel(name: str) -> Callable[[bytes], None]:
    """A function of the library that takes its argument block."""
    function = getattr(library(), name)
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    return function


def linear_call(node: fx.Node) -> Call:
    """A call of qpass.packed_linear."""
    x, packed, alpha, beta, offset, row_scale, row_zero, other, n, act, out_scale, out_zero, dtype = node.args
    launch, pack, k = kernel("qpass_linear"), LINEAR.pack, int(x.meta["val"].shape[-1])
    held = [constant(c) for c in (packed, alpha, beta, offset)]
    w, a, b, o = (t.data_ptr() for t in held)
    tail = (ACTIVATIONS.index(act), OUT_TYPES[dtype])
    inverse, zero, threads = 1 / out_scale, float(out_zero), torch.get_num_threads

    def run(x: Tensor, scale: Tensor | None, zeros: Tensor | None, other: Tensor | None, *, held=held) -> Tensor:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], n), dtype=dtype)
        row = rows = addend = kind = 0
        if scale is not None and zeros is not None:
            scale, zeros = scale.contiguous(), zeros.contiguous()
            row, rows = scale.data_ptr(), zeros.data_ptr()
        if other is not None:
            other = other.contiguous()
            addend, kind = other.data_ptr(), OUT_TYPES[other.dtype]
        pointers = (x.data_ptr(), w, a, b, row, o, rows, addend, out.data_ptr())
        launch(pack(*pointers, x.numel() // k, n, k, k, n, n, *tail, kind, 0, threads(), inverse, zero))
        return out

    return run, (x, row_scale, row_zero, other)


def weight_only_call(node: fx.Node) -> Call:
    """A call of qpass.weight_only_linear."""
    x, packed, alpha, beta, other, n, act, dtype = node.args
    launch, pack, k = kernel("qpass_linear"), LINEAR.pack, int(x.meta["val"].shape[-1])
    held = [constant(c) for c in (packed, alpha, beta)]
    w, a, b = (t.data_ptr() for t in held)
    tail = (ACTIVATIONS.index(act), OUT_TYPES[dtype])

    def run(x: Tensor, other: Tensor | None, *, held=held) -> Tensor:
        x = x.float().contiguous()
        out = torch.empty((*x.shape[:-1], n), dtype=dtype)
        addend = kind = 0
        if other is not None:
            other = other.contiguous()
            addend, kind = other.data_ptr(), OUT_TYPES[other.dtype]
        pointers = (x.data_ptr(), w, a, b, 0, 0, 0, addend, out.data_ptr())
        sizes = (x.numel() // k, n, k, k, n, n)
        launch(pack(*pointers, *sizes, *tail, kind, 1, torch.get_num_threads(), 1.0, 0.0))
        return out

    return run, (x, other)


def attention_call(node: fx.Node) -> Call:
    """A call of qpass.attention. Heads that are views of one projection are read where they lie."""
    q, k, v, mask, causal, scale, mul, add = node.args
    launch, pack = kernel("qpass_attention"), ATTENTION.pack
    held = [None if c is None else constant(c) for c in (mul, add)]
    affine = [0 if c is None else c.data_ptr() for c in held]
    dtype = torch.bfloat16 if mul is None else torch.uint8
    read = [heads_of(n) for n in (q, k, v)]
    locate_q, locate_k, locate_v = (source.locate for source in read)
    tail = (int(causal), int(mul is not None))

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, held=held) -> Tensor:
        at_q, (batch, heads, queries, width), q_strides, q = locate_q(q)
        at_k, (_, kv_heads, keys, _), k_strides, k = locate_k(k)
        at_v, (_, _, _, out_width), v_strides, v = locate_v(v)
        out = torch.empty((batch, queries, heads, out_width), dtype=dtype)
        at_mask, kind, mask_strides = 0, 0, (0, 0, 0)
        if mask is not None:
            if mask.stride(-1) != 1 or mask.shape[-1] != keys:
                mask = mask.expand(*mask.shape[:-1], keys).contiguous()
            at_mask, kind = mask.data_ptr(), MASKS[mask.dtype]
            mask_strides = [0 if size == 1 else s for size, s in zip(mask.shape, mask.stride(), strict=True)][:3]
        sizes = (batch, heads, kv_heads, queries, keys, width, out_width)
        out_strides = (queries * heads * out_width, out_width, heads * out_width)
        strides = (*q_strides, *k_strides, *v_strides, *mask_strides, *out_strides)
        pointers = (at_q, at_k, at_v, at_mask, out.data_ptr(), *affine)
        launch(pack(*pointers, *sizes, *strides, kind, *tail, torch.get_num_threads(), scale))
        return out.transpose(1, 2)

    return run, (*(source.node for source in read), mask)


def norm_call(node: fx.Node) -> Call:
    """A call of qpass.norm_quantize."""
    x, weight, bias, eps, rms, mul, add, dynamic, keep = node.args
    launch, width = kernel("qpass_norm"), int(x.meta["val"].shape[-1])
    held = [None if c is None else constant(c).detach().float() for c in (weight, bias, mul, add)]
    addresses = [0 if c is None else c.data_ptr() for c in held]
    nothing = torch.empty(0)

    def run(x: Tensor, *, held=held) -> tuple[Tensor, ...]:
        x = x.contiguous()
        rows = (*x.shape[:-1], 1) if dynamic else (0,)
        normed, codes = torch.empty_like(x) if keep else nothing, torch.empty(x.shape, dtype=torch.uint8)
        scale, zero = torch.empty(rows), torch.empty(rows, dtype=torch.int32)
        out = (normed.data_ptr() if keep else 0, codes.data_ptr())
        out = (*out, scale.data_ptr(), zero.data_ptr()) if dynamic else (*out, 0, 0)
        threads = torch.get_num_threads()
        launch(NORM.pack(x.data_ptr(), *addresses, *out, x.numel() // width, width, int(rms), threads, eps))
        return normed, codes, scale, zero

    return run, (x,)


CALLS = (
    (torch.ops.qpass.packed_linear.default, linear_call),
    (torch.ops.qpass.weight_only_linear.default, weight_only_call),
    (torch.ops.qpass.attention.default, attention_call),
    (torch.ops.qpass.norm_quantize.default, norm_call),
)


def native_calls(gm: fx.GraphModule, more: Sequence[tuple[Any, Callable[[fx.Node], Call]]] = ()) -> dict[fx.Node, Call]:
    """The nodes of a lowered graph that have a kernel, with their calls. more: rows beside CALLS."""
    builders = dict((*CALLS, *more))
    return {node: builders[node.target](node) for node in gm.graph.nodes if node.target in builders}
