"""From a pooling in a lowered graph to the Python function that calls its kernel (see calls.py)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import OUT_TYPES, POOL
from qpass.backends.native.images import channels_last, strides, three
from qpass.backends.native.pool_ops import out_sizes


def pool_call(node: fx.Node, kernel: Callable[[str], Callable[[bytes], None]]) -> tuple[Callable[..., Any], tuple]:
    """A call of qpass.packed_pool; kernel: a function of the library by its name."""
    x, kind, window, stride, padding, dilation, ceil_mode, include, pad_code, mul, add, dtype = node.args
    launch, known, stride = kernel("qpass_pool"), {}, stride or window

    def sized(shape: torch.Size, threads: int) -> tuple:
        batch, channels, *spatial = shape
        out = out_sizes(spatial, window, stride, padding, dilation, ceil_mode)
        sizes = (*three(spatial, 1), *three(out, 1), *three(window, 1), *three(stride, 1), *three(padding, 0))
        sizes = (batch, channels, *sizes, *three(dilation, 1))
        ints = (int(kind == "mean"), int(include), pad_code, OUT_TYPES[dtype], threads)
        return (batch, channels, *out), strides((batch, channels, *out)), strides(shape), (*sizes, *ints, mul, add)

    def run(x: Tensor) -> Tensor:
        key = (x.shape, torch.get_num_threads())
        if key not in known:
            known[key] = sized(*key)
        shape, out_strides, x_strides, tail = known[key]
        if x.stride() != x_strides:
            x = channels_last(x)
        out = torch.empty_strided(shape, out_strides, dtype=dtype)
        launch(POOL.pack(x.data_ptr(), out.data_ptr(), *tail))
        return out

    return run, (x,)
