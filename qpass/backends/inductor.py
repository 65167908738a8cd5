"""Generate one kernel for a region with torch's inductor. The only file that touches torch._inductor.

A region is traced to core ATen with inductor's decompositions and handed to its inner compiler, so a call costs the
generated wrapper alone (about 6 microseconds) and none of torch.compile's guards. Where there is no C++ compiler the
region runs as plain torch calls, and the reason is kept.
"""

from __future__ import annotations

import functools
import logging
import shutil
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from qpass import ops
from qpass.graphs import fake_mode

LOG = logging.getLogger("qpass")
Q = torch.ops.qpass
# ops of ours that a kernel computes from their own definition
DECOMPOSITIONS = {
    Q.quantize.default: ops.quantize,
    Q.dequantize.default: ops.dequantize,
    Q.choose_qparams.default: ops.choose_qparams,
}


@functools.cache
def unavailable() -> str | None:
    """None where inductor can generate C++ on this machine, or why not."""
    import os

    compiler = os.environ.get("CXX", "g++")
    if not any(shutil.which(name) for name in (compiler, "g++", "clang++")):
        return "there is no C++ compiler (g++ or clang++), so pointwise work runs as single torch calls"
    return None


def compile_region(part: fx.GraphModule) -> Callable[..., tuple[Any, ...]]:
    """A region as one generated function of its inputs, positional; returns a tuple of its outputs.

    part: placeholders carry fake tensors with symbolic sizes in `meta["val"]`. Sizes that appear in them are found from
    the tensors themselves.
    """
    from torch._guards import TracingContext, tracing
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

    mode = fake_mode(part)
    inputs = [_resolved(node.meta["val"]) for node in part.graph.nodes if node.op == "placeholder"]
    symbols = _symbols(inputs)
    sizes = [size for size, _, _ in symbols]
    with mode, torch.no_grad():
        trace = make_fx(lambda *args: part(*args[len(sizes) :]), decomposition_table=select_decomp_table() | DECOMPOSITIONS)
        flat = trace(*sizes, *inputs)
    flat.graph.set_codegen(fx.graph.CodeGen())  # make_fx's own unflattens results, which inductor hands back flat
    flat.recompile()
    context = TracingContext.try_get() or TracingContext(mode)
    with tracing(context):
        compiled = compile_fx_inner(flat, [*sizes, *inputs])
    call = compiled.current_callable
    where = tuple((index, axis) for _, index, axis in symbols)

    def run(*args: Any) -> Any:
        return call([*(args[i] if axis is None else args[i].shape[axis] for i, axis in where), *args])

    run.compiled = compiled  # keeps what the callable needs alive
    return run


def _resolved(value: Any) -> Any:
    """A symbolic size by the symbol it was found equal to: the one that the tensors' sizes are written in."""
    if not isinstance(value, torch.SymInt):
        return value
    return value.node.shape_env.create_symintnode(value.node.expr, hint=value.node.hint)


def _symbols(inputs: list[Any]) -> list[tuple[Any, int, int | None]]:
    """Each plain symbol among the sizes of the inputs once: (symbol, input, axis or None where the input is an int)."""
    found: dict[str, tuple[Any, int, int | None]] = {}
    for i, value in enumerate(inputs):
        sizes = enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]
        for axis, size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_symbol:
                found.setdefault(str(size), (size, i, axis))
    return list(found.values())
