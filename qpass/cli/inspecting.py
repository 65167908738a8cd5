"""python -m qpass inspect: what was asked for of a model, printed or written."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import qpass
from qpass.cli import tables
from qpass.cli.made import called, quantized
from qpass.cli.targets import Target, attribute, build, is_file
from qpass.errors import QpassError
from qpass.inspect.report import Report
from qpass.storage import plan_from_data, read

OF_FLOAT = ("explain", "worst", "tree", "json", "csv", "html")  # they show errors, so these are measured


def inspect(options: argparse.Namespace) -> None:
    """Shows what was asked for of a model; passes and rules can be shown without one."""
    alone = options.target is None
    if alone and options.passes:
        return tables.passes()
    if alone and options.rules:
        return tables.rules()
    if options.worst is not None and options.worst < 1:
        raise QpassError(f"--worst {options.worst} is not a positive number of sites.")
    report = _report(options)
    for name, show in WAYS:
        if getattr(options, name):
            if name in OF_GRAPHS and not report.records:
                raise QpassError(f"{options.target} brings no graph: {_how_to_get_one(options)}")
            return show(report, options)
    return print(report)


def _worst(report: Report, options: argparse.Namespace) -> None:
    if not report.errors:
        raise QpassError(f"{options.target} brings no inputs to measure errors on: {_how_to_get_one(options)}")
    tables.worst(report, options.worst)


def _json(report: Report, options: argparse.Namespace) -> None:
    if options.json == "-":
        return print(report.to_json())
    report.to_json(options.json)
    return print(f"wrote {options.json}")


def _csv(report: Report, options: argparse.Namespace) -> None:
    if options.csv == "-":
        return print(report.to_csv(), end="")
    report.to_csv(options.csv)
    return print(f"wrote {options.csv}")


def _graphml(report: Report, options: argparse.Namespace) -> None:
    report.to_graphml(options.graphml, options.level, options.depth, options.graph)
    print(f"wrote {options.graphml}")


def _html(report: Report, options: argparse.Namespace) -> None:
    report.to_html(options.html, options.depth)
    print(f"wrote {options.html}")


# option, what it shows; the first that was given
WAYS: tuple[tuple[str, Callable[[Report, Any], None]], ...] = (
    ("plan", lambda report, _: tables.plan(report.plan)),
    ("explain", lambda report, options: print(report.explain(options.explain))),
    ("worst", _worst),
    ("tree", lambda report, _: tables.tree(report)),
    ("json", _json),
    ("csv", _csv),
    ("html", _html),
    ("after", lambda report, options: print(report.graph(options.after, options.graph))),
    ("diff", lambda report, options: print(report.diff(*options.diff, options.graph))),
    ("passes", lambda report, options: tables.passes(report.record(options.graph))),
    ("rules", lambda report, _: tables.rules(report.records)),
    ("dot", lambda report, options: print(report.to_dot(options.level, options.depth, options.graph))),
    ("graphml", _graphml),
)
OF_GRAPHS = ("after", "diff", "passes", "rules", "dot", "graphml")


def _how_to_get_one(options: argparse.Namespace) -> str:
    if not is_file(options.target or "mlp"):
        return "let its factory return (model, example_inputs)."
    return "it is a saved file; give the float model it was made from, --model package.module:factory."


def _report(options: argparse.Namespace) -> Report:
    name = options.target or "mlp"
    if is_file(name):
        return _of_file(name, options)
    if options.model:
        raise QpassError(f"--model goes with a saved file; {name!r} is a model already.")
    target = build(name, may_be_file=True)
    return _measured(quantized(target, options.scheme, options.backend), target, options)


def _measured(compiled: Any, target: Target, options: argparse.Namespace) -> Report:
    """The report, with errors where somebody wants to see them and the target brings batches."""
    asked = options.metric is not None or options.alone or options.times
    batches = [target.batch] if target.calibration is None else target.calibration
    if target.batch is None or not (asked or any(getattr(options, name) for name in OF_FLOAT)):
        if asked:
            raise QpassError(
                f"{target.name} brings no inputs to measure with: let its factory return (model, example_inputs)."
            )
        return qpass.inspect(compiled)
    metric = options.metric
    if metric is not None and ":" in metric:
        metric = attribute(metric)
    if target.calibration is not None and not hasattr(batches, "__len__"):
        batches = [target.batch]  # a generator that calibration has used up
    return qpass.inspect(compiled, target.model, batches, metric=metric, alone=options.alone, times=options.times)


def _of_file(name: str, options: argparse.Namespace) -> Report:
    if options.scheme:
        raise QpassError(f"{name} holds a plan, which has its scheme already; leave --scheme out.")
    header, tensors = read(name, "plan", "model")
    if not options.model:
        if options.metric is not None or options.alone or options.times:
            raise QpassError(f"{name} brings no inputs to measure with: {_how_to_get_one(options)}")
        kept = {key: t for key, t in tensors.items() if not key.startswith("state|")}
        return Report(plan_from_data(header["plan"], kept), (), header.get("backend", "none"))
    target = build(options.model)
    if header["kind"] == "model":
        compiled = qpass.load(name, target.model, options.backend)
        if target.batch is not None:
            called(compiled, target.batch)()
    else:
        compiled = qpass.compile(
            target.model, plan=qpass.Plan.load(name), example_inputs=target.batch, backend=options.backend
        )
    if header["kind"] == "model":  # the file has weights of its own; the float model's may be others
        return qpass.inspect(compiled)
    return _measured(compiled, target, options)
