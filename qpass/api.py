"""The call a user makes: compile. It checks its input first and leaves the caller's model untouched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from qpass import checks, profit
from qpass.backends import Backend, backend_named
from qpass.backends.cuda_graphs import check_mode
from qpass.calibrate import Batch, buffers_kept, call_arguments
from qpass.errors import QpassError
from qpass.in_place import told_if_in_part
from qpass.install import copy_for_packing, install, packed_weights, uninstall
from qpass.interrupts import heard
from qpass.memory import give_back
from qpass.pipeline import Settings
from qpass.plan import Plan
from qpass.planning import RecipeLike, analyze, asked_for, of_modules, tell_default
from qpass.runtime import all_or_nothing, attach, run_float
from qpass.schemes import Recipe, Scheme
from qpass.trained import training_of

LOG = logging.getLogger("qpass")


def compile(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    example_inputs: Batch | None = None,
    calibration: Iterable[Batch] | None = None,
    recipe: RecipeLike = None,
    backend: str = "auto",
    inplace: bool = False,
    plan: Plan | None = None,
    guard: bool | None = None,
    mode: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    *,
    max_loss: float | None = None,
    metric: Any = None,
    validation: Iterable[Batch] | None = None,
    candidates: Sequence[str | Scheme | None] | None = None,
) -> nn.Module:
    """The same model, quantized and compiled: same class, methods and attributes, smaller weights, faster calls.

    scheme: `w8a8` (static int8 inputs), `w8a8-dynamic` (per row, at run time), `w8a16` (weights alone); omitted: static
    where calibration is given, else dynamic (`w7a8` on processors whose 8-bit products saturate), and float where integers
    are slower. example_inputs and each item of
    calibration: a tensor, a tuple (positional) or a mapping (keywords). recipe: module-path globs to a scheme or None
    (float); the first match wins. plan: from `analyze` or `Plan.load`, instead of scheme, calibration and recipe.
    inplace: pack the weights of this very model instead of a copy, without data one by one, in the float model's own memory.
    guard: leave sites in float that are faster so
    (default: only where scheme is omitted). mode: `reduce-overhead` replays CUDA graphs; a result is then valid until the
    next call. checkpoint: a directory, see `analyze`.

    scheme `auto`: the smallest model that loses at most max_loss, measured on validation (default: calibration) once it is
    compiled; candidates and metric as in `qpass.search`. Where none does, QpassError shows the best.

    The result is for inference: it computes no gradients, and hooks added after its first call are not run, as with
    torch.compile.
    """
    Settings.from_env()
    if scheme == "auto":
        _check_auto(plan, guard, model)
        rest = (max_loss, metric, candidates, example_inputs, calibration, validation, recipe, checkpoint)
        return _automatic(model, example_inputs, backend, mode, inplace, *rest)
    _check_not_auto(max_loss=max_loss, metric=metric, validation=validation, candidates=candidates)
    checks.check_model(model)
    if training_of(model) is not None:
        from qpass.qat.training import lowered

        checks.check_trained_alone(scheme, calibration, recipe, checkpoint, plan)
        model, plan = lowered(model, inplace)
        inplace = True
    chosen, mode = backend_named(backend, checks.device_of(model)), check_mode(mode)
    if scheme is None and isinstance(recipe, Recipe):
        scheme = recipe.default
    free = scheme is None and plan is None  # nothing was asked for, so float is an answer too
    judged = free and guard is not False and example_inputs is not None
    given = (example_inputs, calibration)
    if plan is not None:
        _check_plan(model, plan, example_inputs, scheme, calibration, recipe, checkpoint)
    elif inplace and scheme is not None and not guard and (rules := _by_weight(scheme, recipe, checkpoint, *given)):
        with told_if_in_part(model), heard():
            plan = of_modules(model, rules, in_place=True)
    else:
        asked = chosen.scheme(calibration is not None) if scheme is None else scheme
        plan = analyze(model, asked, example_inputs, calibration, recipe, checkpoint)
        tell_default(plan, scheme)
        profit.guard(plan, chosen, decide=free if guard is None else guard)
    target = model if inplace and not judged else copy_for_packing(model, plan.packed)
    with buffers_kept(model), buffers_kept(target), all_or_nothing(target), heard():
        _equip(target, plan, chosen, mode)
        if judged:
            _never_slower(model, target, plan, example_inputs, chosen)
            target = _moved(model, plan, chosen, mode) if inplace else target
        if example_inputs is not None:
            checks.warm_up(target, example_inputs)
    give_back()
    nothing = scheme is not None and not plan.quantized
    LOG.log(logging.WARNING if nothing else logging.INFO, "%s", plan.summary())
    return target


def _by_weight(
    scheme: str | Scheme, recipe: RecipeLike, checkpoint: str | os.PathLike[str] | None, *data: object
) -> Recipe | None:
    """The recipe, where it can be followed one weight after another: no data, and each weight is read at one width."""
    if any(given is not None for given in data):
        return None
    rules, schemes = asked_for(scheme, None, recipe, checkpoint)
    return None if any(s.nested for s in schemes) else rules


def _automatic(
    model: nn.Module, example_inputs: Batch | None, backend: str, mode: str | None, inplace: bool, *rest: Any
) -> nn.Module:
    """What `scheme="auto"` finds; the tries are copies of the model."""
    from qpass.search.auto import automatic

    def make(plan: Plan, inplace: bool = False) -> nn.Module:
        return compile(model, plan=plan, example_inputs=example_inputs, backend=backend, inplace=inplace, mode=mode)

    with heard():
        found, plan = automatic(model, make, *rest)
    return make(plan, inplace=True) if inplace else found


def _check_auto(plan: Plan | None, guard: bool | None, model: nn.Module) -> None:
    checks.check_module(model)
    if plan is not None or guard or training_of(model) is not None:
        which = "plan" if plan is not None else "guard=True" if guard else "a model that was prepared and trained"
        raise QpassError(f"scheme='auto' finds a plan of its own, by bytes and loss; {which} does not go with it.")


def _check_not_auto(**given: object) -> None:
    name = next((name for name, value in given.items() if value is not None), None)
    if name is not None:
        raise QpassError(
            f"{name} goes with scheme='auto', which looks for a recipe; leave it out, or pass scheme='auto'."
        )


def _check_plan(model: nn.Module, plan: Plan, example_inputs: Batch | None, *others: object) -> None:
    checks.check_plan_alone(plan, *others)
    checks.check_plan_fits(plan, dict(model.named_parameters(remove_duplicate=False)), type(model).__name__)
    if example_inputs is not None:
        checks.check_inputs(model, example_inputs, "example_inputs")


def _equip(target: nn.Module, plan: Plan, backend: Backend, mode: str) -> None:
    """Packs the weights of a model in place and makes it run compiled."""
    there = packed_weights(target)
    install(target, {name: packed for name, packed in plan.packed.items() if name not in there}, plan.biases)
    attach(target, plan, backend, mode)


def _moved(model: nn.Module, plan: Plan, backend: Backend, mode: str) -> nn.Module:
    """The caller's own model, made what a trial on its copy has shown to be best."""
    with all_or_nothing(model):
        _equip(model, plan, backend, mode)
        if not plan.quantized:
            run_float(model)
    return model


CLEAR_GAIN = 0.25  # of the float model's time: predicted gains above it need no second look


def _never_slower(model: nn.Module, target: nn.Module, plan: Plan, example: Batch, backend: Backend) -> None:
    """Runs in float, through torch.compile, where that is faster: nothing quantized, or gains too small to be sure."""
    args, kwargs = call_arguments(example, "example_inputs")
    eager = profit.whole_model_us(lambda: eager_call(model, *args, **kwargs))
    judged = [d for d in plan.quantized if d.input_type is not None and d.rows and d.operation == "linear"]
    timings = [profit.timing(d, backend) for d in judged if profit.predicts(backend)]
    gain = sum(t.float_us - t.integer_us for t in timings)
    if plan.quantized and gain > CLEAR_GAIN * eager:
        return
    fast = torch.compile(model, dynamic=False)
    as_float = profit.whole_model_us(lambda: eager_call(fast, *args, **kwargs))
    if plan.quantized:
        quantized = profit.whole_model_us(lambda: target(*args, **kwargs))
        if quantized <= as_float * profit.MARGIN:
            return
        plan.notes.append(f"the whole model is faster in float: {as_float:.0f} us, {quantized:.0f} us quantized")
    else:
        plan.notes.append("no site gains from integers here: the model runs in float, through torch.compile")
    uninstall(target, dict(model.named_parameters(remove_duplicate=False)))
    for d in plan.quantized:
        plan.decisions[d.site] = d.as_float("the whole model is faster in float")
    run_float(target)


def eager_call(model: nn.Module, *args: object, **kwargs: object) -> object:
    """A call without gradients."""
    with torch.no_grad():
        return model(*args, **kwargs)
