"""What a site costs: milliseconds of its product by itself at its real shape, and its share of what the machine can do.

    share = max(operations / peak, bytes / bandwidth) / time        (the roofline: Williams et al. 2009)

    operations   two for each multiply-add                 peak: a square product of SIDE, by the same backend and type
    bytes        input, weight and output, each once       bandwidth: a copy of COPIED floats

The product is timed as the backend lowers it, outside the model: the quantize of its input and what is fused behind it are
not in it. Linears only; peaks are measured once a process.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from qpass.backends import Backend
from qpass.calibrate import Batch, call_arguments
from qpass.plan import Decision, Plan
from qpass.profit import alone, example_inputs, median_us
from qpass.timing import interleaved

SIDE = 1024
COPIED = 1 << 24
ROUNDS = 5
ONLY_LINEARS = "times of single sites are those of linears of integers or float32; other sites have none"
ONLY_CPU = "times of single sites are measured on a CPU alone: on a GPU small operations overlap"


@dataclass(frozen=True)
class SiteTime:
    """Milliseconds of one site's product; roofline: 0 to 1."""

    milliseconds: float
    roofline: float


@dataclass(frozen=True)
class Times:
    """whole: milliseconds of the model's call, {"float", "quantized"}. sites: by name."""

    whole: dict[str, float] | None = None
    sites: Mapping[str, SiteTime] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def measure_times(model: nn.Module, q: nn.Module, plan: Plan, backend: Backend, batch: Batch) -> Times:
    """Times of both models on one batch, in turn, and of each linear that has a shape in the plan."""
    args, kwargs = call_arguments(batch, "the batch to time")

    def call(which: nn.Module) -> Callable[[], Any]:
        def run() -> Any:
            with torch.no_grad():
                return which(*args, **kwargs)

        return run

    whole = interleaved({"float": call(model), "quantized": call(q)}, ROUNDS, warm_up=1)
    if any(p.device.type != "cpu" for p in model.parameters()):
        return Times(whole, {}, (ONLY_CPU,))
    linears = [d for d in plan if _timed(d)]
    known: dict[Any, SiteTime] = {}
    sites = {}
    for d in linears:
        key = (d.rows, d.shape, str(d.weight_type), str(d.input_type), d.input_scale is None)
        if key not in known:
            known[key] = site_time(d, backend)
        sites[d.site] = known[key]
    others = any(d.shape and not _timed(d) and not d.is_output for d in plan)
    return Times(whole, sites, (ONLY_LINEARS,) if others else ())


def _timed(d: Decision) -> bool:
    """Whether a site is a linear of known rows, in float or of integers that a backend multiplies."""
    types = [t for t in (d.weight_type, d.input_type) if t is not None]
    codes = d.input_type is None or not d.input_type.signed
    return d.operation == "linear" and bool(d.rows and d.shape) and codes and not any(t.is_float for t in types)


def site_time(d: Decision, backend: Backend) -> SiteTime:
    """Milliseconds and share of the roofline of one linear."""
    ms = _product_ms(d, backend)
    wide = 4 if d.input_type is None else 1
    weight = 4 * math.prod(d.shape) if d.packed is None else d.packed.nbytes
    n, k = d.shape
    moved = d.rows * (k * wide + n * 4) + weight
    peak = _peak(d, backend)
    needed = max(2 * d.macs / peak, moved / bandwidth())
    return SiteTime(ms, min(needed / (ms / 1e3), 1.0))


def _product_ms(d: Decision, backend: Backend) -> float:
    if not d.quantized:
        n, k = d.shape
        x, weight, bias = torch.randn(d.rows, k), torch.randn(n, k), torch.randn(n)
        return median_us(lambda: functional.linear(x, weight, bias)) / 1e3
    inputs = example_inputs(d)
    run = alone(d, inputs, backend)
    return median_us(lambda: run(*inputs)) / 1e3


_PEAKS: dict[Any, float] = {}


def _peak(d: Decision, backend: Backend) -> float:
    """Operations a second of a large product of a site's types; float's own where that is quicker."""
    scale = None if d.input_scale is None else torch.tensor(0.01)
    square = dataclasses.replace(d, rows=SIDE, shape=(SIDE, SIDE), input_scale=scale)
    key = (backend.name, str(d.weight_type), str(d.input_type), scale is None)
    if key not in _PEAKS:
        asked = [square, square.as_float("")] if d.quantized else [square]
        _PEAKS[key] = max(2 * SIDE**3 / (_product_ms(each, backend) / 1e3) for each in asked)
    return _PEAKS[key]


@functools.cache
def bandwidth() -> float:
    """Bytes a second of a copy that no cache holds, reads and writes counted."""
    source = torch.rand(COPIED)  # pages of zeros may be one page
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_us(lambda: _copy(target, source)) / 1e6)


def _copy(target: Tensor, source: Tensor) -> Tensor:
    return target.copy_(source)
