"""The commands, one function each; they print, and raise QpassError for what cannot be done."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from typing import Any

import torch

import qpass
from qpass.checks import check_calibration
from qpass.cli import tables
from qpass.cli.inspecting import inspect as inspect
from qpass.cli.made import called, quantized
from qpass.cli.targets import Target, build
from qpass.errors import QpassError
from qpass.plan import sizes
from qpass.processes import count, joined, mine, rank
from qpass.runtime import runtime_of
from qpass.schemes import Scheme


def demo(options: argparse.Namespace) -> None:
    """MiniLM with its real weights, on real text."""
    from qpass.demo import demo

    demo(str(Scheme.parse(options.scheme)))


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
        compiled = quantized(target, options.scheme, options.backend, recipe=recipe, checkpoint=options.checkpoint)
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
    calls = {"float": called(target.model, target.batch), "float, torch.compile": _inductor(target)}
    if not schemes:
        calls["qpass"] = called(qpass.compile(target.model, None, target.batch, target.calibration), target.batch)
    for scheme in schemes:
        calls[f"qpass {scheme}"] = called(quantized(target, str(scheme), options.backend), target.batch)
    tables.times(interleaved(calls, options.rounds), {name: call() for name, call in calls.items()})


def _inductor(target: Target) -> Callable[[], Any]:
    model = target.model
    compiled = torch.compile(lambda *args, **kwargs: model(*args, **kwargs), dynamic=False)
    return called(compiled, target.batch)
