"""The report as plain JSON values: what `to_json` writes and a page reads. Its schema is schema.json beside this file.

Every key is there; what was not measured is null. Numbers are finite.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from qpass.errors import QpassError
from qpass.inspect import levels
from qpass.inspect.figures import SiteError
from qpass.inspect.known import Known
from qpass.inspect.weights import weight_figures
from qpass.plan import Decision
from qpass.served import Record
from qpass.slices import tensor_of

FORMAT, VERSION = "qpass-report", 1
FLOAT_BYTES = 4
LINES = 1_000_000


def document(report: Known, limited: bool = True) -> dict[str, Any]:
    """The whole report. limited: raises QpassError where a graph has more than a million nodes."""
    if limited:
        for record in report.records:
            for step in record.steps:
                check_size(record, step)
    return {
        "format": FORMAT,
        "version": VERSION,
        "summary": summary(report),
        "sites": sites(report),
        "graphs": [_graph(record) for record in report.records],
        "front": report.plan.front,
    }


def sites(report: Known, weights: bool = True) -> list[dict[str, Any]]:
    """Every site of the plan. weights: also the figures of its weights, for which these are all read."""
    rules = levels.rules_of([step for record in report.records for step in record.steps])
    return [_site(report, d, rules.get(d.site, []), weights) for d in report.plan]


def version() -> str:
    """Of the installed qpass; without an installation, of the source."""
    from importlib import metadata

    try:
        return metadata.version("qpass-torch")
    except metadata.PackageNotFoundError:
        return "unknown"


def summary(report: Known) -> dict[str, Any]:
    """The figures of the whole model."""
    plan, measured = report.plan, report.measured
    places = [d for d in plan if not d.is_output]
    share = {d.weight: math.prod(d.shape) for d in plan.quantized}
    packed = sum(p.nbytes for p in plan.packed.values())
    before = FLOAT_BYTES * plan.parameters
    macs = sum(d.macs for d in places)
    return {
        "model": report.model,
        "scheme": str(plan.scheme),
        "backend": report.backend,
        "qpass": version(),
        "torch": torch.__version__,
        "parameters": {"all": plan.parameters, "quantized": sum(share.values())},
        "multiply_adds": {"all": macs, "quantized": sum(d.macs for d in plan.quantized)} if macs else None,
        "bytes": {"float": before, "quantized": before - FLOAT_BYTES * sum(share.values()) + packed},
        "sites": {"quantized": len(plan.quantized), "float": len(places) - len(plan.quantized)},
        "metric": measured.metric,
        "loss": _number(measured.loss),
        "milliseconds": report.times.whole,
        "batches": measured.batches,
        "notes": [*plan.notes, *measured.notes, *report.times.notes],
    }


def _site(report: Known, d: Decision, rules: list[str], weights: bool) -> dict[str, Any]:
    time = report.times.sites.get(d.site)
    return {
        **_plan(d),
        **_error(report.errors.get(d.site)),
        **_weight(report, d, weights),
        "milliseconds": None if time is None else _number(time.milliseconds),
        "roofline": None if time is None else _number(time.roofline),
        "source": _source(report, d.site),
        "why_float": d.why or None,
        "note": d.note or None,
        "rules": rules,
        "missed": [
            {"rule": miss.rule, "why": miss.why} for r in report.records for miss in r.misses if d.site in miss.sites
        ],
        "kept": [why for r in report.records for site, why in r.kept if d.site in site.split("+")],
    }


def _plan(d: Decision) -> dict[str, Any]:
    count = math.prod(d.shape) if d.shape else 0
    size = FLOAT_BYTES * count or None
    static = d.input_scale is not None
    return {
        "site": d.site,
        "module": d.site.partition(":")[0],
        "operation": d.operation,
        "quantized": d.quantized or (d.is_output and d.input_type is not None),
        "weight_type": str(d.weight_type) if d.weight_type else None,
        "input_type": str(d.input_type) if d.input_type else None,
        "shape": list(d.shape),
        "parameters": count,
        "multiply_adds": d.macs or None,
        "bytes_float": size,
        "bytes": size if d.packed is None else d.packed.nbytes,
        "range": None if _number(d.lo) is None or _number(d.hi) is None else [d.lo, d.hi],
        "scale": _number(float(d.input_scale)) if static else None,
        "zero_point": int(d.input_zero) if static and d.input_zero is not None else None,
        "group": d.group if d.group and d.group != d.site else None,
    }


def _error(e: SiteError | None) -> dict[str, Any]:
    names = ("clipped", "sqnr", "cosine", "worst", "loss_alone", "loss_without")
    found = {name: None if e is None else _number(getattr(e, name)) for name in names}
    histogram = None if e is None or e.histogram is None else vars(e.histogram)
    scatter = None
    if e is not None and e.scatter[0]:
        scatter = dict(zip(("float", "quantized"), ([_number(v) for v in side] for side in e.scatter), strict=True))
    return found | {"input_histogram": histogram, "scatter": scatter}


def _weight(report: Known, d: Decision, read: bool) -> dict[str, Any]:
    found = weight_figures(d, tensor_of(report.weights, d.weight)) if read else None
    if found is None:
        return {"weight_channels": None, "weight_histogram": None}
    return {
        "weight_channels": found.channels,
        "weight_histogram": None if found.histogram is None else vars(found.histogram),
    }


def _source(report: Known, site: str) -> dict[str, Any] | None:
    for known in (report.measured.sources, *(record.sources for record in report.records)):
        if site in known:
            return vars(known[site])
    return None


def _graph(record: Record) -> dict[str, Any]:
    return {
        "name": record.name,
        "seconds": record.seconds,
        "passes": [{"name": s.name, "level": s.level, "edits": s.edits, "seconds": s.seconds} for s in record.steps],
        "levels": [
            {"level": step.level, "after": step.name, "nodes": [node.data() for node in levels.nodes(step)]}
            for step in levels.last_of_levels(record.steps)
        ],
    }


def check_size(record: Record, step: Any) -> None:
    """A graph that can be written down node by node."""
    count = levels.size(step)
    if count > LINES:
        raise QpassError(
            f"{record.name} has {count:,} nodes after {step.name}, more than {LINES:,}: no viewer opens that. Collapse it to "
            "modules with depth=, such as report.to_dot(depth=3) or --depth 3."
        )


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
