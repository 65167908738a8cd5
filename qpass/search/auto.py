"""scheme="auto": the smallest recipe whose loss, measured on the compiled model, is within a bound.

    1. the least bytes whose predicted loss is within the bound, as an integer program
    2. that recipe is compiled, and its loss measured on the user's batches
    3. while it breaks the bound: the groups of sites that lose most for their bytes move on to candidates that lose less, one
       after another, as far as the losses say is needed (twice as many after each try), and 2. again

A first recipe that is far within the bound is tried once more with what is left. What was given up, and where, is in the
plan's notes. Nothing that breaks the bound is returned: where no recipe holds, an error shows the best.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from qpass.calibrate import Batch, buffers_kept, call_arguments, shown
from qpass.errors import QpassError
from qpass.inspect.metric import Losses, name_of
from qpass.interrupts import stop_if_asked
from qpass.padding import mask_of
from qpass.plan import Plan
from qpass.planning import RecipeLike
from qpass.schemes import Recipe
from qpass.search import CANDIDATES
from qpass.search.candidates import FLOAT
from qpass.search.cost import Table, bytes_table
from qpass.search.explored import MEASURED, SECOND_ORDER, Search, explored
from qpass.search.front import as_data, front
from qpass.search.metric import checked, of_model, value_of
from qpass.search.program import best, solve, total

LOG = logging.getLogger("qpass")
ROUNDS = 24
FAR = 0.7  # of the bound: below it there is room for a smaller recipe
NONE_HOLDS = (
    "scheme='auto': no quantized recipe keeps {metric} within max_loss={bound:.4g}. The best of {tried} that were compiled "
    "and measured loses {loss:.4g}, with {sites} sites quantized: {recipe}. Allow more, or add candidates of more bits."
)


@dataclass(frozen=True)
class Try:
    """A recipe that was compiled, and what it lost."""

    chosen: Mapping[str, str]
    recipe: Recipe
    plan: Plan
    loss: float
    model: nn.Module | None = None


@dataclass
class Backoff:
    """The state of the way back. per: measured loss over the predicted; steps: how many groups the last try moved."""

    known: Search
    table: Table
    bound: float
    steps: int = 1
    notes: list[str] = field(default_factory=list)

    def predicted(self, chosen: Mapping[str, str]) -> float:
        """The loss that the groups' own add up to."""
        return self.known.base + total(_positive(self.known.loss), chosen)

    def cheapest(self, bound: float) -> dict[str, str]:
        """The least bytes at a predicted loss within the bound; where none is, the least loss with every group quantized."""
        loss = _positive(self.known.loss)
        room = bound - self.known.base
        found = solve(self.known.groups, self.table.of, loss, room) if room > 0 else None
        if found is not None and any(name != FLOAT for name in found.values()):
            return found
        quantized = [replace(g, takes=tuple(c for c in g.takes if c != FLOAT)) for g in self.known.groups]
        return best(quantized, loss, self.table.of)

    def back(self, tried: Try) -> dict[str, str] | None:
        """The choice with groups moved on to candidates that lose less; None where each loses least already."""
        chosen, loss = dict(tried.chosen), _positive(self.known.loss)
        scale = tried.loss / max(self.predicted(chosen), 1e-30)
        moved = 0
        while moved < self.steps or scale * self.predicted(chosen) > self.bound:
            steps = [
                ((loss[g.name, chosen[g.name]] - loss[g.name, c]) / max(more, 1.0), more, g.name, c)
                for g in self.known.groups
                for c in g.takes
                if loss[g.name, c] < loss[g.name, chosen[g.name]]
                and (more := self.table.of[g.name, c] - self.table.of[g.name, chosen[g.name]]) is not None
            ]
            if not steps:
                break
            _, more, name, candidate = max(steps)
            self.notes.append(
                f"auto: {name} gave up {chosen[name]} for {candidate}, {more:,.0f} bytes more: "
                f"the model lost {tried.loss:.4g}"
            )
            chosen[name] = candidate
            moved += 1
        self.steps *= 2
        return chosen if moved else None


def _positive(loss: Mapping[tuple[str, str], float]) -> dict[tuple[str, str], float]:
    """A group that seems to gain by being rounded gains nothing."""
    return {key: max(value, 0.0) for key, value in loss.items()}


def automatic(
    model: nn.Module, make: Callable[[Plan], nn.Module], max_loss: object, metric: Any, candidates: Any,
    example_inputs: Batch | None, calibration: Iterable[Batch] | None, validation: Iterable[Batch] | None,
    recipe: RecipeLike, checkpoint: Any,
) -> tuple[nn.Module, Plan]:  # fmt: skip
    """The compiled model that keeps the bound, and its plan. make: compiles a copy of the model by a plan.

    Of a function of the model the sites are ranked by what they do to its output, from gradients: one number of a whole data
    set tells little of one site, and takes long.
    """
    bound = _checked(max_loss)
    data = None if calibration is None else list(calibration)
    seen = None if validation is None else list(validation)
    batches = seen or data or [example_inputs]
    alone = of_model(metric)
    base = checked(metric, model, batches[0])[1] if alone and batches[0] is not None else 0.0
    known = explored(
        model, "auto" if alone else metric, CANDIDATES if candidates is None else candidates, example_inputs, data, seen,
        recipe, False, SECOND_ORDER if alone else MEASURED, checkpoint, 0,
    )  # fmt: skip
    name = name_of(metric) if alone else known.measurement.chosen

    def loss_of(q: nn.Module) -> float:
        if alone:
            return value_of(metric, q, "the compiled model") - base
        return compared(model, q, batches, known.measurement.metric)

    way = Backoff(known, bytes_table(known.prepared, known.groups), bound)
    found, tried = _searched(way, make, loss_of, math.inf if alone else bound)
    if found is None:
        worst = [t for t in tried if t.plan.quantized] or tried
        nearest = min(worst, key=lambda t: t.loss)
        rules = ", ".join(f"{glob}: {scheme or 'float'}" for glob, scheme in nearest.recipe.rules)
        text = f"{nearest.recipe.default}" + (f" but for {rules}" if rules else "")
        raise QpassError(
            NONE_HOLDS.format(
                metric=name,
                bound=bound,
                tried=len(tried),
                loss=nearest.loss,
                sites=len(nearest.plan.quantized),
                recipe=text,
            )
        )
    size = way.table.total(found.chosen)
    found.plan.notes += [
        *(note for note in way.notes),
        f"auto: {name} {found.loss:.4g} of at most {bound:.4g} on the validation data; {size:,.0f} bytes; {len(tried)} tried",
    ]
    here = {"cost": size, "predicted": way.predicted(found.chosen), "loss": found.loss}
    found.plan.front = as_data(front(known.groups, known.loss, way.table, known.base), "bytes", name, here)
    assert found.model is not None
    return found.model, found.plan


def _checked(max_loss: object) -> float:
    if isinstance(max_loss, bool) or not isinstance(max_loss, int | float) or not 0 < max_loss < math.inf:
        raise QpassError(
            f"max_loss={max_loss!r}; scheme='auto' needs the most that the model may lose, a number above 0 in units of the "
            "metric, such as max_loss=0.01."
        )
    return float(max_loss)


def _searched(
    way: Backoff, make: Callable[[Plan], nn.Module], loss_of: Callable[[nn.Module], float], first: float
) -> tuple[Try | None, list[Try]]:
    """The smallest try that holds, or None; and all that were made, without their models."""
    tried: list[Try] = []
    good: Try | None = None
    chosen: dict[str, str] | None = way.cheapest(first)
    for _ in shown(range(ROUNDS), "validating"):
        stop_if_asked()
        assert chosen is not None
        recipe, plan = way.known.plan(chosen)
        if not plan.quantized:
            break
        q = make(plan)
        here = Try(chosen, recipe, plan, loss_of(q), q)
        tried.append(Try(chosen, recipe, plan, here.loss))
        LOG.info("auto: %.4g of at most %.4g, %s bytes", here.loss, way.bound, f"{way.table.total(chosen):,.0f}")
        if here.loss <= way.bound:
            smaller = good is None or way.table.total(chosen) < way.table.total(good.chosen)
            good = here if smaller else good
            if len(tried) > 1 or here.loss > FAR * way.bound:
                break
            scale = way.bound / max(here.loss, 1e-30)
            again = way.cheapest(scale * way.predicted(chosen))
            if again == chosen:
                break
            chosen = again
        elif good is not None:  # the second, smaller recipe breaks the bound; the first holds
            break
        else:
            chosen = way.back(here)
            if chosen is None:
                break
    return good, tried


def compared(model: nn.Module, q: nn.Module, batches: Iterable[Batch], metric: Any) -> float:
    """The loss of a compiled model against the float one."""
    losses = Losses(metric)
    with buffers_kept(model), torch.no_grad():
        for number, batch in enumerate(batches):
            args, kwargs = call_arguments(batch, f"batch {number}")
            wanted = model(*args, **kwargs)
            losses.add(("", "all"), q(*args, **kwargs), wanted, mask_of(model, args, kwargs))
    return losses.of("", "all") or 0.0
