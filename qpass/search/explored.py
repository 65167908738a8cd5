"""All that is known of a model before a recipe is chosen: plans of the candidates, groups of sites, what each loses."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from qpass import checks
from qpass.calibrate import Batch
from qpass.errors import QpassError, nearest
from qpass.inspect.branches import Products
from qpass.plan import Plan
from qpass.planning import RecipeLike, analyze
from qpass.schemes import Recipe
from qpass.search.candidates import Prepared, parsed, prepare
from qpass.search.estimate import KINDS, second_order
from qpass.search.groups import Group, groups
from qpass.search.kept import Kept, made_of
from qpass.search.measured import Measurement
from qpass.search.metric import checked
from qpass.search.program import check_scipy
from qpass.search.result import recipe_of

MEASURED, SECOND_ORDER = "measured", "second order"
ESTIMATES = (MEASURED, SECOND_ORDER)
Values = Mapping[tuple[str, str], float]


@dataclass
class Search:
    """All that is known of a model before something is chosen."""

    model: nn.Module
    prepared: Prepared
    groups: list[Group]
    losses: dict[str, Values]
    measurement: Measurement
    base: float
    example: Batch | None
    calibration: Sequence[Batch] | None
    rules: Recipe
    notes: list[str]

    @property
    def loss(self) -> Values:
        """The losses that are chosen by."""
        return next(iter(self.losses.values()))

    def plan(self, chosen: Mapping[str, str], checkpoint: Any = None) -> tuple[Recipe, Plan]:
        """The recipe of a choice, and its plan, calibrated as the recipe asks for."""
        recipe = recipe_of(self.prepared, self.groups, chosen, self.rules)
        return recipe, analyze(self.model, None, self.example, self.calibration, recipe, checkpoint)

    def true_loss(self, plan: Plan) -> float:
        """The loss of a plan, simulated."""
        products = Products(plan)
        return self.measurement.loss(dict.fromkeys(products.decisions, products))


def explored(
    model: nn.Module, metric: Any, candidates: Any, example_inputs: Batch | None, calibration: Iterable[Batch] | None,
    validation: Iterable[Batch] | None, recipe: RecipeLike, tables: bool, estimate: str,
    checkpoint: str | os.PathLike[str] | None, seed: int,
) -> Search:  # fmt: skip
    """Everything up to the choice: plans, groups, losses."""
    check_scipy()
    if estimate not in ESTIMATES:
        near = nearest(estimate, ESTIMATES) if isinstance(estimate, str) else ""
        raise QpassError(f"estimate={estimate!r} is none of {', '.join(ESTIMATES)}.{near}")
    checks.check_model(model)
    schemes = parsed(candidates)
    checks.check_calibration([s for s in schemes.values() if s is not None], calibration)
    data = _listed(calibration, "calibration")
    batches = _listed(validation, "validation") or data or ([example_inputs] if example_inputs is not None else [])
    if not batches:
        raise QpassError(
            "search measures losses on batches; pass calibration=[batch, ...], validation= or example_inputs=."
        )
    example = example_inputs if example_inputs is not None else batches[0]
    metric, value = checked(metric, model, batches[0])
    kept = Kept(None, "", "")
    if checkpoint is not None:
        plans = made_of(model, [example, data], str(Recipe.parse(recipe)), tables)
        kept = Kept(checkpoint, plans, made_of(None, batches, list(schemes), _name(metric)))
    prepared = prepare(model, schemes, example, data, recipe, tables, kept)
    parts = groups(prepared)
    measurement = Measurement(model, prepared, parts, batches, metric, value, kept)
    losses: dict[str, Values] = {}
    base = 0.0
    if estimate == MEASURED:
        losses[MEASURED], base = measurement.losses()
    notes: list[str] = []
    try:
        if estimate == SECOND_ORDER or metric in KINDS:
            losses[SECOND_ORDER] = second_order(model, prepared, parts, batches, metric, seed)
    except QpassError as error:
        if estimate == SECOND_ORDER:
            raise
        notes.append(f"there is no second order to compare with: {error}")
    return Search(model, prepared, parts, losses, measurement, base, example, data, Recipe.parse(recipe), notes)


def _listed(batches: Any, what: str) -> list[Batch] | None:
    if batches is None:
        return None
    if isinstance(batches, Tensor | Mapping | str | tuple) or not isinstance(batches, Iterable):
        raise QpassError(
            f"{what} is a {type(batches).__name__}; expected an iterable of batches, such as [batch, ...]."
        )
    found = list(batches)
    if not found:
        raise QpassError(f"{what} gave no batches (empty, or an iterator used up); pass a list or a fresh iterator.")
    return found


def _name(metric: Any) -> str:
    return metric if isinstance(metric, str) else f"{metric.__module__}.{getattr(metric, '__qualname__', '')}"
