"""From a node of a lowered graph to the Python function that calls its kernel: what never changes is filled in once.

Each call copies the prepared argument block, so that two threads may run one graph.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import ACTIVATIONS, MASKS, OUT_TYPES, STRIDES, Attention, Linear
from qpass.backends.native.build import library
from qpass.graphs import constant

Call = tuple[Callable[..., Any], tuple[Any, ...]]  # what runs, and the arguments of the node it is given


@functools.cache
def kernel(name: str) -> Callable[[Any], None]:
    """A function of the library that takes its argument block."""
    function = getattr(library(), name)
    function.argtypes, function.restype = (ctypes.c_void_p,), None
    return function


def linear_call(node: fx.Node) -> Call:
    """A call of qpass.packed_linear."""
    x, packed, alpha, beta, offset, row_scale, row_zero, other, n, act, out_scale, out_zero, dtype = node.args
    launch, k = kernel("qpass_linear"), int(x.meta["val"].shape[-1])
    held = [constant(c) for c in (packed, alpha, beta, offset)]
    template = Linear(
        **dict(zip(("w", "alpha", "beta", "offset"), (t.data_ptr() for t in held), strict=True)),
        **{"n": n, "k": k, "ldx": k, "ld_other": n, "ld_out": n, "act": ACTIVATIONS.index(act)},
        **{"out_type": OUT_TYPES[dtype], "out_inverse": 1 / out_scale, "out_zero": float(out_zero)},
    )

    def run(x: Tensor, row_scale: Tensor | None, row_zero: Tensor | None, other: Tensor | None, *, held=held) -> Tensor:
        x = x.contiguous()
        out = torch.empty((*x.shape[:-1], n), dtype=dtype)
        a = Linear.from_buffer_copy(template)
        a.x, a.out, a.m, a.threads = x.data_ptr(), out.data_ptr(), x.numel() // k, torch.get_num_threads()
        if row_scale is not None and row_zero is not None:
            row_scale, row_zero = row_scale.contiguous(), row_zero.contiguous()
            a.row_scale, a.row_zero = row_scale.data_ptr(), row_zero.data_ptr()
        if other is not None:
            other = other.contiguous()
            a.other, a.other_type = other.data_ptr(), OUT_TYPES[other.dtype]
        launch(ctypes.addressof(a))
        return out

    return run, (x, row_scale, row_zero, other)


def attention_call(node: fx.Node) -> Call:
    """A call of qpass.attention."""
    q, k, v, mask, causal, scale, mul, add = node.args
    launch = kernel("qpass_attention")
    held = [None if c is None else constant(c) for c in (mul, add)]
    dtype = torch.bfloat16 if mul is None else torch.uint8
    template = Attention(causal=causal, scale=scale, to_u8=mul is not None)
    if mul is not None:
        template.mul, template.add = (t.data_ptr() for t in held)

    def run(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, *, held=held) -> Tensor:
        q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
        batch, heads, queries, width = q.shape
        out = torch.empty((batch, queries, heads, v.shape[3]), dtype=dtype).transpose(1, 2)
        a = Attention.from_buffer_copy(template)
        a.q, a.k, a.v, a.out = q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr()
        a.batch, a.heads, a.kv_heads, a.queries = batch, heads, k.shape[1], queries
        a.keys, a.width, a.out_width, a.threads = k.shape[2], width, v.shape[3], torch.get_num_threads()
        a.q_stride, a.k_stride = STRIDES(*q.stride()[:3]), STRIDES(*k.stride()[:3])
        a.v_stride, a.out_stride = STRIDES(*v.stride()[:3]), STRIDES(*out.stride()[:3])
        if mask is not None:
            if mask.stride(-1) != 1 or mask.shape[-1] != k.shape[2]:
                mask = mask.expand(*mask.shape[:-1], k.shape[2]).contiguous()
            wide = mask.expand(batch, heads, queries, k.shape[2])
            a.mask, a.mask_type, a.mask_stride = mask.data_ptr(), MASKS[mask.dtype], STRIDES(*wide.stride()[:3])
        launch(ctypes.addressof(a))
        return out

    return run, (q, k, v, mask)


CALLS = (
    (torch.ops.qpass.packed_linear.default, linear_call),
    (torch.ops.qpass.attention.default, attention_call),
)


def native_calls(gm: fx.GraphModule) -> dict[fx.Node, Call]:
    """The nodes of a lowered graph that have a kernel, with their calls."""
    builders = dict(CALLS)
    return {node: builders[node.target](node) for node in gm.graph.nodes if node.target in builders}
