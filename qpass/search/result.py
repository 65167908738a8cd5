"""What a search comes back with: the recipe, what it costs and loses, how well that was predicted, and the front."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from qpass.files import replacing
from qpass.plan import Plan
from qpass.schemes import Recipe, Scheme
from qpass.search.budget import Budget
from qpass.search.candidates import FLOAT, Prepared
from qpass.search.cost import Table
from qpass.search.front import Point, as_data, svg
from qpass.search.groups import Group, by_site

Values = Mapping[tuple[str, str], float]


@dataclass(frozen=True)
class Found:
    """recipe: for `compile(recipe=...)`; plan: made by it, for `compile(plan=...)`. loss: of the plan, measured.

    predicted: estimate -> what it foresaw; rank: Spearman correlation of `second order` with `measured` over all groups and
    candidates, None where one of them was not made. cost: in the budget's unit; costs, fronts: by `bytes`, `bits`, `ms`.
    losses: estimate -> (group, candidate) -> loss. baseline: what a greedy search would have lost, as predicted.
    """

    recipe: Recipe
    plan: Plan
    chosen: Mapping[str, str]
    loss: float
    metric: str
    predicted: Mapping[str, float]
    rank: float | None
    budget: Budget
    cost: float
    costs: Mapping[str, float]
    fronts: Mapping[str, Sequence[Point]]
    losses: Mapping[str, Values]
    tables: Mapping[str, Table]
    groups: Sequence[Group]
    baseline: float | None = None
    milliseconds: float | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    @property
    def front(self) -> Sequence[Point]:
        """The front in the unit of the budget."""
        return self.fronts[self.budget.kind]

    def plot(self, path: str | os.PathLike[str], unit: str | None = None) -> None:
        """Writes the picture of a front as SVG. unit: `bytes`, `bits` or `ms`; default: the budget's."""
        kind = unit or self.budget.kind
        with replacing(path) as part:
            part.write_text(svg(self.data(kind)))

    def data(self, unit: str | None = None) -> dict:
        """A front as plain values."""
        kind = unit or self.budget.kind
        here = {"cost": self.costs[kind], "predicted": next(iter(self.predicted.values())), "loss": self.loss}
        return as_data(self.fronts[kind], kind, self.metric, here)

    def __str__(self) -> str:
        """The choice of each group, the cost, the loss, and how well it was foreseen."""
        width = max(len(g.name) for g in self.groups)
        lines = []
        for group in self.groups:
            more = f"  and {len(group.sites) - 1} more" if len(group.sites) > 1 else ""
            lines.append(f"  {group.name:<{width}}  {self.chosen[group.name]}{more}")
        text = self.budget.text
        limit = f" of {text(self.budget.limit)}" if self.budget.limit else ""
        size = f"{self.costs['bytes']:,.0f} bytes, {self.costs['bits']:.4g} bits a weight"
        lines.append(f"cost: {text(self.cost)}{limit} ({size})")
        told = ", ".join(f"{value:.4g} by {name}" for name, value in self.predicted.items())
        lines.append(f"{self.metric}: {self.loss:.4g} measured; predicted {told}")
        if self.rank is not None:
            lines.append(f"second order against measured: Spearman {self.rank:.3f} over {self._compared()} losses")
        if self.milliseconds is not None:
            lines.append(f"a call takes {self.milliseconds:.4g} ms")
        return "\n".join([*lines, *self.notes])

    def _compared(self) -> int:
        return len(compared(*self.losses.values()))


def compared(*losses: Values) -> list[tuple[str, str]]:
    """The (group, candidate) that each of some tables holds, float left out."""
    return [key for key in losses[0] if key[1] != FLOAT and all(key in other for other in losses)]


def spearman(first: Sequence[float], second: Sequence[float]) -> float | None:
    """The rank correlation, None of fewer than three or of equals alone."""
    from scipy.stats import spearmanr

    if len(first) < 3 or len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(spearmanr(first, second).statistic)


def recipe_of(prepared: Prepared, groups: Sequence[Group], chosen: Mapping[str, str], rules: Recipe) -> Recipe:
    """The recipe that makes a choice: the caller's rules, then a rule for each module, or site where a module has several.

    The default is the scheme that most sites take; those that nothing is chosen for follow the caller's rules, or stay float.
    """
    sites = by_site(list(groups), chosen)
    schemes = prepared.schemes
    picked = [schemes.get(name) for name in sites.values()]
    default = max((s for s in picked if s is not None), key=picked.count, default=None)
    default = default or next(s for s in schemes.values() if s is not None)
    modules: dict[str, set[str]] = {}
    for site, name in sites.items():
        modules.setdefault(site.partition(":")[0], set()).add(name)
    own: dict[str, Scheme | None] = {}
    for site, name in sites.items():
        path = site.partition(":")[0]
        if name != str(default) or site in prepared.special:
            own.setdefault(path if path and len(modules[path]) == 1 else site, schemes.get(name))
    return Recipe((*rules.rules, *own.items()), default)
