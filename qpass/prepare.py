"""prepare_qat: from a float model to the same model, fake-quantized where a plan quantizes it, ready to be trained."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Sequence

from torch import nn

from qpass.calibrate import Batch, buffers_kept, evaluating
from qpass.checks import check_module, check_one_width
from qpass.errors import QpassError, nearest
from qpass.memory import give_back
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Plan
from qpass.planning import RecipeLike, analyze
from qpass.qat.subgradients import method_named
from qpass.qat.training import install_training, trainable
from qpass.schemes import Recipe, Scheme
from qpass.trained import training_of

STARTS = ("auto", "rounded", "steps", "published")


def prepare_qat(
    model: nn.Module,
    scheme: str | Scheme,
    example_inputs: Batch | None = None,
    calibration: Iterable[Batch] | None = None,
    recipe: RecipeLike = None,
    *,
    method: str = "lsq+",
    start: str = "auto",
    inplace: bool = False,
) -> nn.Module:
    """The same model, fake-quantized where `compile` would quantize it: train it as before, then `qpass.compile` it.

    scheme: any wNaM, 2 <= N, M <= 8 or M = 16; `w4a4-dynamic` has inputs per token. example_inputs, calibration, recipe:
    as in `compile`; where inputs have static steps, one of the first two is needed for their first ones. method: the
    subgradients, `lsq+`, `lsq`, `ewgs`, `pact` or `ste` (qpass/qat/subgradients). inplace: prepare this very model instead
    of a copy. start: where weights begin:

    rounded     moved to the codes that `compile` chooses, with its steps and factors of input channels
    steps       as they are, with the steps that `compile` would choose without factors
    published   as they are, with the first steps of the method's paper
    auto        `steps` where they have at least 4 bits and their inputs a step per token, else `rounded`

    Parameters, buffers, hooks, dropout, batch norm and the training flag of each module are the model's own.
    """
    chosen = method_named(method)
    if start not in STARTS:
        raise QpassError(f"start {start!r} is not one of {', '.join(STARTS)}.{nearest(str(start), STARTS)}")
    _check(model)
    asked, rules = Scheme.parse(scheme), Recipe.parse(recipe, scheme)
    start = _best_start(asked) if start == "auto" else start
    plain = start != "rounded"
    parsed = _bare(asked, plain)
    rules = Recipe(tuple((glob, None if s is None else _bare(s, plain)) for glob, s in rules.rules), parsed)
    static = next((s for s in (parsed, *(s for _, s in rules.rules)) if s is not None and s.needs_calibration), None)
    if static is not None and calibration is None and example_inputs is None:
        raise QpassError(
            f"scheme {static.name} trains a step for each input, and its first one comes from data: pass "
            f"example_inputs=batch, or more of them as calibration=[batch, ...]; '{static.name}-dynamic' needs none."
        )
    if calibration is None and example_inputs is not None:
        calibration = [example_inputs]
    example = calibration[0] if example_inputs is None and isinstance(calibration, Sequence) else example_inputs
    with evaluating(model):
        plan = analyze(model, parsed, example_inputs, calibration, rules)
        check_one_width(plan, "Training is for one width")
        with buffers_kept(model):
            plan = trainable(model, plan, example)
    _check_plan(model, plan, rules)
    target = model if inplace else copy.deepcopy(model)
    install_training(target, plan, chosen, start)
    give_back()
    return target


def _best_start(scheme: Scheme) -> str:
    """What training of a scheme does better from, as far as it was measured (docs/training.md); a factor asked for stays."""
    many_codes = scheme.weight is not None and scheme.weight.bits >= 4
    return "steps" if many_codes and scheme.dynamic and scheme.smooth in ("auto", None) else "rounded"


def _bare(scheme: Scheme, plain: bool) -> Scheme:
    """The scheme with nothing that a training has no place for: factors between convolutions, corrected biases, copies of
    channels. The factors of a linear's inputs stay (qat/channels.py), but where it is plain.
    """
    if scheme.weight is not None and scheme.weight.is_float:
        raise QpassError(f"scheme {scheme.name} has floats of 8 bits, which have no step to train; choose wNaM.")
    smooth = None if plain else scheme.smooth
    return dataclasses.replace(scheme, smooth=smooth, equalize="none", bias="none", split="none")


def _check(model: nn.Module) -> None:
    check_module(model)
    record = training_of(model)
    if record is not None:
        raise QpassError(
            f"this {type(model).__name__} is prepared for {record.plan.scheme} already; go back to float weights with "
            "qpass.qat.float_model(model) and prepare those for another scheme."
        )
    if not any(p.requires_grad for p in model.parameters()):
        raise QpassError(
            f"nothing in this {type(model).__name__} can be trained: no parameter requires a gradient; call "
            "model.requires_grad_(True), or freeze parts of it only."
        )


def _check_plan(model: nn.Module, plan: Plan, rules: Recipe) -> None:
    if not plan.quantized:
        raise QpassError(
            f"no site of this {type(model).__name__} is fake-quantized under {plan.scheme.name}:\n{plan.summary()}"
        )
    asked: dict[str, tuple[str, object]] = {}
    for d in plan.quantized:
        scheme = rules.scheme_for(d.site)
        if d.operation == LOOKUP or scheme is None:
            continue
        site, weight = asked.setdefault(d.weight, (d.site, scheme.weight))
        if weight != scheme.weight:
            raise QpassError(
                f"{d.site} and {site} read one parameter, {d.weight!r}, and the recipe asks for {scheme.weight} and "
                f"{weight}; give both the same scheme, or untie them."
            )
