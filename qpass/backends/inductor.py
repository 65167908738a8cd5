"""Generate one kernel for a region with torch's inductor. The only file that compiles with torch._inductor.

A region is traced to core ATen under a fake mode of its own, so that nothing it learns about sizes reaches the shape
environment of a torch.compile in progress, and handed to inductor's inner compiler. A call costs the generated wrapper
alone (about 3 microseconds) and none of torch.compile's guards. Where nothing can be generated the region runs as plain
torch calls, and the reason is logged.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass import ops

LOG = logging.getLogger("qpass")
LOCK = threading.RLock()  # inductor's compile state is process wide in parts
HINT = 64  # assumed for every symbol: real hints would decide whether and over which loops a kernel is parallel
FAR = HINT**3  # assumed for symbols of strides alone: rows of a part lie farther apart than they are long
OPTIONS = {
    "size_asserts": False,  # half of a call; kernels are looked up by dtype, sizes and strides
    "alignment_asserts": False,
    "cpp.dynamic_threads": True,  # else the thread count of compile time is compiled in
    "cpp.threads": 512,  # with the next: parallel over batch, heads and rows, so also at batch 1
    "cpp.min_chunk_size": 1,
    "cpp.enable_floating_point_contract_flag": "off",  # x * s + z is what eager computes
}
Q = torch.ops.qpass
# ops of ours that a kernel computes from their own definition
DECOMPOSITIONS = {
    Q.quantize.default: ops.quantize,
    Q.dequantize.default: ops.dequantize,
    Q.choose_qparams.default: ops.choose_qparams,
}


@functools.cache
def unavailable() -> str | None:
    """None where inductor can build C++ on this machine, or why not. Builds and runs one small kernel, once a process."""
    graph = fx.Graph()
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (graph.placeholder("x"), 1)),))
    try:
        compiled = _compile(fx.GraphModule(torch.nn.Module(), graph), [torch.zeros(32)])
        return None if float(compiled(torch.ones(32))[0][0]) == 2 else "inductor's first kernel computes wrongly"
    except Exception as error:  # no compiler, no headers, no OpenMP, an inductor of another shape
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def compile_region(part: fx.GraphModule) -> Callable[..., Any]:
    """A region as one generated function of its inputs, positional, that returns the tuple of its outputs.

    part: placeholders carry fake tensors, or symbolic sizes, in `meta["val"]`.
    """
    reason = unavailable()
    if reason is None:
        try:
            return _compile(part, [node.meta["val"] for node in part.graph.nodes if node.op == "placeholder"])
        except Exception as error:  # any failure of the generator costs speed, never the result
            reason = f"{type(error).__name__}: {error}"
    LOG.warning("a region of %d operations runs as single torch calls: %s", len(part.graph.nodes), reason)
    return part.forward


def _compile(part: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    from torch._guards import TracingContext, tracing
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table
    from torch._subclasses import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx
    from torch.fx.experimental.symbolic_shapes import ShapeEnv
    from torch.utils._python_dispatch import _disable_current_modes

    with LOCK, _disable_current_modes(), torch.no_grad():
        mode = FakeTensorMode(shape_env=ShapeEnv(duck_shape=False))
        symbols: dict[str, Any] = {}
        _name_symbols(inputs, mode, symbols)
        fakes = [_refake(value, mode, symbols) for value in inputs]
        where = [_locate(name, symbol, fakes) for name, symbol in symbols.items()]
        sizes = list(symbols.values())
        with mode, tracing(TracingContext(mode)), config.patch(OPTIONS):
            table = select_decomp_table() | DECOMPOSITIONS | ops.POINTWISE
            flat = make_fx(lambda *a: part(*a[len(sizes) :]), decomposition_table=table)(*sizes, *fakes)
            flat.graph.set_codegen(
                fx.graph.CodeGen()
            )  # make_fx's own unflattens results, inductor hands them back flat
            flat.recompile()
            compiled = compile_fx_inner(flat, [*sizes, *fakes], is_inference=True)
        if unproved := _unproved([guard.expr for guard in mode.shape_env.guards], inputs, symbols):
            raise RuntimeError(f"the kernel would be for some sizes only: {', '.join(map(str, unproved))}")
    return _caller(compiled.current_callable, where, compiled)


def _unproved(guards: Sequence[Any], inputs: Sequence[Any], symbols: dict[str, Any]) -> list[Any]:
    """What was taken to be true of the assumed sizes, and may not be of every size that the region is called with.

    The shape environment of the inputs knows: its own guards are asked on every call, or hold by what they are.
    """
    sizes = [s for v in inputs for s in ((*v.shape, *v.stride()) if isinstance(v, Tensor) else (v,))]
    symbolic = [size.node for size in sizes if isinstance(size, torch.SymInt)]
    if not symbolic:
        return list(guards)
    theirs = {str(symbol): symbol for node in symbolic for symbol in node.expr.free_symbols}
    own = {symbol.node._expr: theirs[name] for name, symbol in symbols.items()}
    true = symbolic[0].shape_env._maybe_evaluate_static
    return [guard for guard in guards if not true(guard.xreplace(own))]


def _caller(call: Callable[..., Any], where: Sequence[tuple[int, int | None, int]], keep: Any) -> Callable[..., Any]:
    """call([sizes..., inputs...]) as a plain function. Made from text: a loop over `where` costs a microsecond."""
    sizes = [f"a[{i}]{'' if axis is None else f'.shape[{axis}]'}{'' if k == 1 else f' // {k}'}" for i, axis, k in where]
    scope: dict[str, Any] = {"call": call, "keep": keep}
    exec(f"def run(*a):\n    return call([{''.join(size + ', ' for size in sizes)}*a])", scope)
    return scope["run"]


def _name_symbols(inputs: Sequence[Any], mode: Any, symbols: dict[str, Any]) -> None:
    """Makes the symbols of sizes, then those of strides alone: with the hint of a length, a part would pass for a whole."""
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    for value in tensors:
        for size in value.shape:
            _size(size, mode, symbols)
    for value in tensors:
        for stride in value.stride():
            _size(stride, mode, symbols, FAR)


def _refake(value: Any, mode: Any, symbols: dict[str, Any]) -> Any:
    """The same tensor or size under `mode`, its symbols replaced by symbols of `mode`."""
    if not isinstance(value, Tensor):
        return _size(value, mode, symbols)
    shape, stride = ([_size(size, mode, symbols) for size in sizes] for sizes in (value.shape, value.stride()))
    with mode:
        return torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)


def _size(size: Any, mode: Any, symbols: dict[str, Any], hint: int = HINT) -> Any:
    if not isinstance(size, torch.SymInt):
        return size
    from torch.utils._sympy.interp import sympy_interp
    from torch.utils._sympy.reference import PythonReferenceAnalysis

    expression = size.node.expr
    known = {symbol: _symbol(str(symbol), mode, symbols, hint) for symbol in expression.free_symbols}
    return sympy_interp(PythonReferenceAnalysis, known, expression)


def _symbol(name: str, mode: Any, symbols: dict[str, Any], hint: int) -> Any:
    if name not in symbols:
        from torch._dynamo.source import ConstantSource
        from torch.fx.experimental.symbolic_shapes import DimDynamic

        source = ConstantSource(name)
        made = mode.shape_env.create_symbol(hint, source, dynamic_dim=DimDynamic.DYNAMIC, constraint_dim=None)
        symbols[name] = mode.shape_env.create_symintnode(made, hint=hint, source=source)
    return symbols[name]


def _locate(name: str, symbol: Any, fakes: Sequence[Any]) -> tuple[int, int | None, int]:
    """Where a call finds a symbol's value: (input, axis, k) with size = k * symbol; axis None for an int input."""
    found = []
    for i, value in enumerate(fakes):
        for axis, size in enumerate(value.shape) if isinstance(value, Tensor) else [(None, value)]:
            if isinstance(size, torch.SymInt) and (ratio := size.node.expr / symbol.node.expr).is_Integer:
                found.append((int(ratio), i, axis))
    if not found:
        raise RuntimeError(f"no input has a size that is a multiple of {name}")
    ratio, i, axis = min(found, key=lambda entry: entry[0])
    return i, axis, ratio
