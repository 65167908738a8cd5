"""The commands, one function each; they print, and raise QpassError for what cannot be done."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import qpass
from qpass.calibrate import call_arguments
from qpass.checks import check_calibration
from qpass.cli import tables
from qpass.cli.targets import Target, build, is_file
from qpass.errors import QpassError
from qpass.inspect.report import Report
from qpass.plan import sizes
from qpass.processes import count, joined, mine, rank
from qpass.runtime import runtime_of
from qpass.schemes import Scheme
from qpass.storage import plan_from_data, read


def demo(options: argparse.Namespace) -> None:
    """MiniLM with its real weights, on real text."""
    from qpass.demo import demo

    demo(str(Scheme.parse(options.scheme)))


def inspect(options: argparse.Namespace) -> None:
    """Shows what was asked for of a model; passes and rules can be shown without one."""
    alone = options.target is None
    if alone and options.passes:
        return tables.passes()
    if alone and options.rules:
        return tables.rules()
    report = _report(options)
    if options.plan:
        return tables.plan(report.plan)
    if options.explain:
        return print(report.explain(options.explain))
    if options.json:
        return print(report.to_json())
    if not report.records and (options.after or options.diff or options.passes or options.rules):
        raise QpassError(f"{options.target} brings no graph: {_how_to_get_one(options)}")
    if options.after:
        return print(report.graph(options.after, options.graph))
    if options.diff:
        return print(report.diff(*options.diff, options.graph))
    if options.passes:
        return tables.passes(report.record(options.graph))
    if options.rules:
        return tables.rules(report.records)
    return print(report)


def _how_to_get_one(options: argparse.Namespace) -> str:
    if not is_file(options.target):
        return "let its factory return (model, example_inputs)."
    return "it is a saved file; give the float model it was made from, --model package.module:factory."


def _report(options: argparse.Namespace) -> Report:
    name = options.target or "mlp"
    if is_file(name):
        return _of_file(name, options)
    if options.model:
        raise QpassError(f"--model goes with a saved file; {name!r} is a model already.")
    target = build(name, may_be_file=True)
    compiled = _compiled(target, options.scheme, options.backend)
    return qpass.inspect(compiled, *(target.model, target.batch) if options.explain or options.json else ())


def _of_file(name: str, options: argparse.Namespace) -> Report:
    if options.scheme:
        raise QpassError(f"{name} holds a plan, which has its scheme already; leave --scheme out.")
    header, tensors = read(name, "plan", "model")
    if not options.model:
        kept = {key: t for key, t in tensors.items() if not key.startswith("state|")}
        return Report(plan_from_data(header["plan"], kept), (), header.get("backend", "none"))
    target = build(options.model)
    if header["kind"] == "model":
        compiled = qpass.load(name, target.model, options.backend)
        if target.batch is not None:
            _call(compiled, target.batch)()
    else:
        compiled = qpass.compile(
            target.model, plan=qpass.Plan.load(name), example_inputs=target.batch, backend=options.backend
        )
    return qpass.inspect(compiled)


def _compiled(target: Target, scheme: str | None, backend: str, **more: Any) -> nn.Module:
    if scheme is None:
        scheme = "w8a8-dynamic" if target.calibration is None else "w8a8"
    return qpass.compile(target.model, scheme, target.batch, target.calibration, backend=backend, **more)


def compile(options: argparse.Namespace) -> None:
    """Quantizes and saves; processes that torchrun has started share the work, and the first of them saves."""
    if options.plan and (options.scheme or options.recipe or options.checkpoint):
        raise QpassError("--plan already holds the scheme and recipe it was made with; give it alone.")
    recipe = dict(_rule(text) for text in options.recipe) or None
    plan = qpass.Plan.load(options.plan) if options.plan else None
    with joined():
        target = _shared(build(options.target))
        if rank() == 0:
            _compile(target, options, plan, recipe)
        elif plan is None and target.calibration is not None:
            qpass.analyze(target.model, options.scheme, target.batch, target.calibration, recipe, options.checkpoint)


def _shared(target: Target) -> Target:
    """The target with the batches that are this process's to calibrate on."""
    if count() == 1 or target.calibration is None:
        return target
    check_calibration([], target.calibration)
    return dataclasses.replace(target, calibration=mine(target.calibration))


def _compile(target: Target, options: argparse.Namespace, plan: qpass.Plan | None, recipe: Any) -> None:
    if plan is not None:
        compiled = qpass.compile(target.model, plan=plan, example_inputs=target.batch, backend=options.backend)
    else:
        compiled = _compiled(target, options.scheme, options.backend, recipe=recipe, checkpoint=options.checkpoint)
    qpass.save(compiled, options.output)
    runtime = runtime_of(compiled)
    assert runtime is not None
    print(runtime.plan.summary())
    print(sizes(runtime.plan))
    print(f"wrote {options.output}")
    if options.save_plan:
        runtime.plan.save(options.save_plan)
        print(f"wrote {options.save_plan}")


def _rule(text: str) -> tuple[str, str | None]:
    glob, equals, scheme = text.rpartition("=")
    if not equals or not glob:
        raise QpassError(f"--recipe {text!r} is not GLOB=SCHEME, such as 'lm_head=float' or '*.attention.*=w8a16'.")
    return glob, None if scheme in ("float", "none") else scheme


def bench(options: argparse.Namespace) -> None:
    """Times a model in float and quantized, in turn, and how far results are from float."""
    from qpass.timing import interleaved

    if options.rounds < 1:
        raise QpassError(f"--rounds {options.rounds} is not a positive number.")
    schemes = [Scheme.parse(text) for text in options.scheme or ()]
    target = build(options.target)
    if target.batch is None:
        raise QpassError(
            f"{target.name} brings no inputs to time it with: let its factory return (model, example_inputs)."
        )
    calls = {"float": _call(target.model, target.batch), "float, torch.compile": _inductor(target)}
    if not schemes:
        calls["qpass"] = _call(qpass.compile(target.model, None, target.batch, target.calibration), target.batch)
    for scheme in schemes:
        calls[f"qpass {scheme}"] = _call(_compiled(target, str(scheme), options.backend), target.batch)
    tables.times(interleaved(calls, options.rounds), {name: call() for name, call in calls.items()})


def _inductor(target: Target) -> Callable[[], Any]:
    model = target.model
    compiled = torch.compile(lambda *args, **kwargs: model(*args, **kwargs), dynamic=False)
    return _call(compiled, target.batch)


def _call(function: Callable[..., Any], batch: Any) -> Callable[[], Any]:
    args, kwargs = call_arguments(batch, "example_inputs")

    def call() -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
