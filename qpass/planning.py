"""Analyze: from a model, what is asked for and some batches to a Plan. The model is not changed."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from torch import nn

from qpass import checks
from qpass.backends import backend_named
from qpass.calibrate import Batch, Session, buffers_kept, gather, observe
from qpass.decide import decide
from qpass.decide_nested import parts_of
from qpass.interrupts import heard
from qpass.module_sites import module_sites
from qpass.observations import Observations, Parts
from qpass.plan import Decision, Plan
from qpass.processes import collected, listed, spread
from qpass.resume import NOTHING_TO_RESUME, begin, part
from qpass.schemes import Recipe, Scheme
from qpass.sequential import ONE_PASS, solve_in_order
from qpass.trained import training_of

SEVEN_BITS = "no scheme was given: {}, since this processor adds integer products in pairs that 8 bits could saturate"
RecipeLike = Mapping[str, "str | Scheme | None"] | Recipe | None


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
    if scheme is None and isinstance(recipe, Recipe):
        scheme = recipe.default
    if scheme is None:
        usual = backend_named("auto", checks.device_of(model))
        plan = analyze(model, usual.scheme(calibration is not None), example_inputs, calibration, recipe, checkpoint)
        return tell_default(plan, None)
    rules, schemes = asked_for(scheme, calibration, recipe, checkpoint)
    if any(s.nested for s in schemes) and calibration is not None:
        calibration = listed(checks.checked(model, calibration))
    alone = lambda r, bits: analyze(model, r.default, example_inputs, calibration, r, part(checkpoint, bits))  # noqa: E731
    parts = parts_of(rules, alone)
    if example_inputs is None and calibration is None:
        return of_modules(model, rules, parts)
    kept = None if calibration is None else begin(model, rules, checkpoint)
    session = Session(model)
    session.observations.moments, session.observations.parts = calibration is not None, parts
    with buffers_kept(model):
        run_example(session, model, example_inputs)
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


def run_example(session: Session, model: nn.Module, example_inputs: Batch | None) -> None:
    """Captures the call that is given as an example, if one is, without counting what it sees."""
    if example_inputs is not None:
        checks.check_inputs(model, example_inputs, "example_inputs")
        session.watching = False
        session.run(example_inputs, "example_inputs")
        session.watching = True


def tell_default(plan: Plan, scheme: str | Scheme | None) -> Plan:
    """The plan, with a note where qpass chose a scheme for want of an asked one that is not the usual."""
    if scheme is None and plan.scheme is not None and plan.scheme.weight.bits < 8:
        plan.notes.append(SEVEN_BITS.format(plan.scheme))
    return plan


def asked_for(
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


def of_modules(model: nn.Module, rules: Recipe, parts: Parts | None = None, in_place: bool = False) -> Plan:
    """The plan of a model that is not run. parts: of nested weights. in_place: its weights are packed on the way."""
    found = module_sites(model)
    checks.check_sites(model, found, ran=False)
    return decide(model, found, rules, Observations(parts=parts or {}), in_place=in_place)
