"""The calls a user makes: compile, analyze. Each checks its input first and leaves the caller's model untouched."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping

import torch
from torch import nn

from qpass import checks, profit
from qpass.backends import Backend, backend_named
from qpass.backends.cuda_graphs import check_mode
from qpass.calibrate import Batch, Session, buffers_kept, call_arguments, gather, observe
from qpass.decide import decide
from qpass.in_place import told_if_in_part
from qpass.install import copy_for_packing, install, packed_weights, uninstall
from qpass.interrupts import heard
from qpass.memory import give_back
from qpass.module_sites import module_sites
from qpass.observations import Observations
from qpass.pipeline import Settings
from qpass.plan import Decision, Plan
from qpass.processes import collected, listed, spread
from qpass.resume import NOTHING_TO_RESUME, begin
from qpass.runtime import all_or_nothing, attach, run_float
from qpass.schemes import Recipe, Scheme
from qpass.sequential import ONE_PASS, solve_in_order
from qpass.trained import training_of

LOG = logging.getLogger("qpass")
SEVEN_BITS = "no scheme was given: {}, since this processor adds integer products in pairs that 8 bits could saturate"
RecipeLike = Mapping[str, "str | Scheme | None"] | Recipe | None


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

    The result is for inference: it computes no gradients, and hooks added after its first call are not run, as with
    torch.compile.
    """
    Settings.from_env()
    checks.check_model(model)
    if training_of(model) is not None:
        from qpass.qat.training import lowered

        checks.check_trained_alone(scheme, calibration, recipe, checkpoint, plan)
        model, plan = lowered(model, inplace)
        inplace = True
    chosen, mode = backend_named(backend, checks.device_of(model)), check_mode(mode)
    free = scheme is None and plan is None  # nothing was asked for, so float is an answer too
    judged = free and guard is not False and example_inputs is not None
    if plan is not None:
        _check_plan(model, plan, example_inputs, scheme, calibration, recipe, checkpoint)
    elif inplace and scheme is not None and not guard and example_inputs is None and calibration is None:
        with told_if_in_part(model), heard():
            plan = _of_modules(model, _rules(scheme, calibration, recipe, checkpoint)[0], in_place=True)
    else:
        asked = chosen.scheme(calibration is not None) if scheme is None else scheme
        plan = analyze(model, asked, example_inputs, calibration, recipe, checkpoint)
        _tell_default(plan, scheme)
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


@heard()
def analyze(
    model: nn.Module,
    scheme: str | Scheme | None = None,
    example_inputs: Batch | None = None,
    calibration: Iterable[Batch] | None = None,
    recipe: RecipeLike = None,
    checkpoint: str | os.PathLike[str] | None = None,
) -> Plan:
    """What `compile` would do, as a Plan to print, edit, save and compile with. The model is not changed.

    checkpoint: a directory that takes the decisions of each group of sites as soon as it is solved, where linears are rounded
    in order of execution; the same call goes on from the last of them if it was interrupted. One pass over the batches
    writes nothing there, and the plan says so. With torch.distributed, all processes call it, each with batches of its own.

    A model in training (`prepare_qat`) has a plan already: it comes back with the codes and steps of now.
    """
    checks.check_model(model)
    if training_of(model) is not None:
        from qpass.qat.training import trained_plan

        checks.check_trained_alone(scheme, calibration, recipe, checkpoint, None)
        return trained_plan(model)
    if scheme is None:
        usual = backend_named("auto", checks.device_of(model))
        plan = analyze(model, usual.scheme(calibration is not None), example_inputs, calibration, recipe, checkpoint)
        return _tell_default(plan, None)
    rules, schemes = _rules(scheme, calibration, recipe, checkpoint)
    if example_inputs is None and calibration is None:
        return _of_modules(model, rules)
    kept = None if calibration is None else begin(model, rules, checkpoint)
    session = Session(model)
    session.observations.moments = calibration is not None
    with buffers_kept(model):
        if example_inputs is not None:
            checks.check_inputs(model, example_inputs, "example_inputs")
            session.watching = False
            session.run(example_inputs, "example_inputs")
            session.watching = True
        if calibration is None:
            checks.check_sites(model, session.sites)
            return decide(model, session.sites, rules, session.observations)
        decided: dict[str, Decision] | str = ""
        batches = checks.checked(model, calibration)
        if any(s.in_order for s in schemes):
            batches = listed(batches)
            decided = solve_in_order(model, session, batches, rules, kept)
        if isinstance(decided, str):
            checks.check_counts(collected(lambda: observe(session, batches)))
            checks.check_same_sites(session.sites)
            session.observations = gather(session.observations)
    checks.check_sites(model, session.sites)
    if not isinstance(decided, str):
        return decide(model, session.sites, rules, session.observations, decided)
    plan = decide(model, session.sites, rules, session.observations, each=spread)
    plan.notes += [ONE_PASS.format(decided)] if decided else []
    plan.notes += [NOTHING_TO_RESUME.format(kept.directory)] if kept else []
    return plan


def _tell_default(plan: Plan, scheme: str | Scheme | None) -> Plan:
    """The plan, with a note where qpass chose a scheme for want of an asked one that is not the usual."""
    if scheme is None and plan.scheme.weight.bits < 8:
        plan.notes.append(SEVEN_BITS.format(plan.scheme))
    return plan


def _rules(
    scheme: str | Scheme,
    calibration: Iterable[Batch] | None,
    recipe: RecipeLike,
    checkpoint: str | os.PathLike[str] | None,
) -> tuple[Recipe, list[Scheme]]:
    """What is asked for, and the schemes in it, for which the calibration must do."""
    parsed = Scheme.parse(scheme)
    rules = Recipe.parse(recipe, parsed)
    schemes = [parsed, *(s for _, s in rules.rules if s is not None)]
    checks.check_calibration(schemes, calibration)
    checks.check_checkpoint(checkpoint, calibration)
    return rules, schemes


def _of_modules(model: nn.Module, rules: Recipe, in_place: bool = False) -> Plan:
    """The plan of a model that is not run. in_place: its weights are packed on the way."""
    found = module_sites(model)
    checks.check_sites(model, found, ran=False)
    return decide(model, found, rules, Observations(), in_place=in_place)
