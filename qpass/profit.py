"""Does a site gain from integers on this machine? Times both at the real shape, once; remembers the answer on disk.

    float: linear(x, w, b)          integers: quantize x (share of a pass over it) + the backend's own linear

The share: an input's quantize is made together with the norm or activation in front of it, so only the bytes it adds are
counted, measured as a copy of x. The linear is a graph of one operation, lowered as any other. Times are medians; the file
is keyed by processor, torch, threads, kernels and shape.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional

from qpass.backends import Backend
from qpass.backends.native.build import cache_folder, processor
from qpass.backends.native.build import unavailable as no_kernels
from qpass.files import replacing
from qpass.passes.widen import carrier
from qpass.plan import Decision, Plan
from qpass.qtype import QType, scale_shape
from qpass.timing import median

MARGIN = 1.02  # integers must not be slower than float by more than measuring can tell
REPEATS, BUDGET_SECONDS = 15, 0.05
Q = torch.ops.qpass


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds of one linear at a shape."""

    float_us: float
    integer_us: float


def guard(plan: Plan, backend: Backend, decide: bool) -> None:
    """Notes on each quantized site that float would run faster; where `decide`, leaves it in float."""
    if not predicts(backend):
        return
    for site, d in list(plan.decisions.items()):
        if not d.quantized or not d.rows or d.operation != "linear" or (d.weight_type and d.weight_type.is_float):
            continue
        found = timing(d, backend)
        if found.integer_us <= found.float_us * MARGIN:
            continue
        assert d.weight_type is not None
        kind = f"int{d.weight_type.bits}" + ("" if d.input_type is not None else " weights")
        times = f"{found.float_us:.0f} us in float, {found.integer_us:.0f} us in {kind} at {d.rows} rows"
        if decide:
            plan.decisions[site] = d.as_float(f"float is faster here: {times}")
        else:
            plan.decisions[site] = dataclasses.replace(
                d, note=f"float would be {found.integer_us / found.float_us:.2f}x as fast: {times}"
            )


def predicts(backend: Backend) -> bool:
    """Whether times of single sites are measured for a backend; a GPU's are not, as small ones overlap there."""
    return backend.name == "cpu"


def timing(d: Decision, backend: Backend) -> Timing:
    """Measured or remembered times of a site."""
    kernels = "onednn" if no_kernels() else "native"
    own = "" if str(_by_rows(d)) == "i8/c0" else f" {_by_rows(d)}"
    key = f"{machine()} {kernels} {d.rows}x{d.shape[1]}x{d.shape[0]} {d.input_type}{own}"
    known = remembered()
    if key not in known:
        known[key] = dataclasses.astuple(_measure(d, backend))
        _remember(known)
    return Timing(*known[key])


@functools.cache
def machine() -> str:
    """Processor, torch and thread count: what a time depends on beside the shape."""
    capability, threads = torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()
    return f"{processor()[0]} {capability} torch {torch.__version__} threads {threads}"


def _measure(d: Decision, backend: Backend) -> Timing:
    n, k = d.shape
    x, weight, bias = torch.randn(d.rows, k), torch.randn(n, k), torch.randn(n)
    inputs = example_inputs(d)
    linear = alone(d, inputs, backend)

    def integers() -> None:
        linear(*inputs)
        if d.input_type is not None:
            x.to(torch.uint8)

    return Timing(median_us(lambda: functional.linear(x, weight, bias)), median_us(integers))


def example_inputs(d: Decision) -> list[Tensor]:
    """What a quantized linear of a decision reads, [rows, K]: floats or codes; also the scales and zero points of rows."""
    if d.input_type is None:
        return [torch.randn(d.rows, d.shape[1])]
    codes = torch.randint(0, d.input_type.levels, (d.rows, d.shape[1]), dtype=torch.uint8)
    if d.input_scale is not None:
        return [codes]
    zero = torch.full((d.rows, 1), d.input_type.levels // 2, dtype=torch.int32)
    return [codes, torch.full((d.rows, 1), 0.01), zero]


def alone(d: Decision, inputs: list[Tensor], backend: Backend) -> Callable[..., object]:
    """One quantized linear of a decision's shape and types, as the backend runs it: a function of `inputs`."""
    held = _constants(d)
    module, graph, mode = torch.nn.Module(), fx.Graph(), FakeTensorMode()
    nodes: dict[str, fx.Node] = {}
    for name, value in zip(("x", "xs", "xz"), inputs, strict=False):
        nodes[name] = graph.placeholder(name)
        nodes[name].meta["val"] = mode.from_tensor(value)
    for name, value in held.items():
        module.register_buffer(name, value)
        nodes[name] = graph.get_attr(name)
        nodes[name].meta["val"] = mode.from_tensor(value)
    scales = (nodes.get("xs"), nodes.get("xz"), "" if d.input_type is None else carrier(str(d.input_type)))
    weight = (nodes["w"], nodes["ws"], str(_by_rows(d)))
    if "wz" in nodes and scales[2]:
        node = _with_zero_points(graph, nodes, *scales, weight[2])
    else:
        rest = (nodes["b"], None, "", None, None, "", torch.float32, nodes.get("wz"))
        node = graph.call_function(Q.linear.default, (nodes["x"], *scales, *weight, *rest))
    _infer(graph, mode)
    output = graph.output(node)
    gm = fx.GraphModule(module, graph)
    if node.target in backend.targets and backend.why_not(node) is None:
        output.args = (backend.lower(gm, node),)
        graph.eliminate_dead_code()
    return backend.finish(gm)


def _by_rows(d: Decision) -> QType:
    """The weight type of a site, the weight held as [N, K]."""
    assert d.weight_type is not None
    return d.weight_type if d.weight_type.axis is None else dataclasses.replace(d.weight_type, axis=0)


def _constants(d: Decision) -> dict[str, Tensor]:
    """Values for what a site's linear holds."""
    qtype = _by_rows(d)
    scale = torch.full(scale_shape(qtype, d.shape), 0.01)
    held = {"w": torch.randint(qtype.qmin, qtype.qmax + 1, d.shape, dtype=qtype.storage), "ws": scale}
    held["b"] = torch.randn(d.shape[0])
    if not qtype.symmetric:
        held["wz"] = torch.full(scale.shape, qtype.levels // 2, dtype=torch.int32)
    if d.input_type is not None and d.input_scale is not None:
        held |= {"xs": torch.tensor(0.01), "xz": torch.tensor(d.input_type.levels // 2, dtype=torch.int32)}
    return held


def _with_zero_points(graph: fx.Graph, nodes, x_scale, x_zero, x_type: str, weight_type: str) -> fx.Node:
    """linear(dequantize(x), dequantize(w), b): a weight with zero points is not part of a product of integers."""
    weight = (nodes["w"], nodes["ws"], nodes["wz"], weight_type, torch.float32)
    x = graph.call_function(Q.dequantize.default, (nodes["x"], x_scale, x_zero, x_type, torch.float32))
    real = graph.call_function(Q.dequantize.default, weight)
    return graph.call_function(torch.ops.aten.linear.default, (x, real, nodes["b"]))


def _infer(graph: fx.Graph, mode: FakeTensorMode) -> None:
    """The value of each call, from those of its arguments."""
    for node in graph.nodes:
        if node.op == "call_function":
            args = fx.map_arg(node.args, lambda n: n.meta["val"])
            with mode:
                node.meta["val"] = node.target(*args)


def median_us(call: Callable[[], object]) -> float:
    """Median microseconds of a call, after warming up."""
    with torch.no_grad():
        call()
        call()
        laps, end = [], time.perf_counter() + BUDGET_SECONDS
        while len(laps) < 3 or (len(laps) < REPEATS and time.perf_counter() < end):
            start = time.perf_counter()
            call()
            laps.append(time.perf_counter() - start)
    return median(laps) * 1e6


def cache_file() -> Path:
    """Where times are remembered: the user's cache folder."""
    return cache_folder() / "timings.json"


def remembered() -> dict[str, list[float]]:
    """The times on disk; none where the file is missing or damaged."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError):
        return {}
    return {key: laps for key, laps in found.items() if _is_timing(laps)} if isinstance(found, dict) else {}


def _is_timing(laps: object) -> bool:
    return isinstance(laps, list) and len(laps) == 2 and all(isinstance(lap, int | float) for lap in laps)


def _remember(times: dict[str, list[float]]) -> None:
    """Writes the times beside the file and moves them there; a full or read-only disk costs only the memory of it."""
    target = cache_file()
    with contextlib.suppress(OSError):
        target.parent.mkdir(parents=True, exist_ok=True)
        with replacing(target) as part:
            part.write_text(json.dumps(remembered() | times))


def whole_model_us(call: Callable[[], object]) -> float:
    """Median microseconds of a model's call, until a GPU has done it: fewer laps than one operation."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    call()
    laps = []
    for _ in range(5):
        wait()
        start = time.perf_counter()
        call()
        wait()
        laps.append(time.perf_counter() - start)
    return median(laps) * 1e6
