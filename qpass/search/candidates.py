"""What each site would become under each candidate: one pass over the calibration batches, then a plan for each scheme.

Weights are rounded on what the float model makes of the batches, not on what rounded layers before them make: the losses of
sites are measured one group at a time, all others float. The recipe that is chosen in the end is calibrated as it asks for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from qpass import checks
from qpass.calibrate import Batch, Session, buffers_kept, observe, shown
from qpass.decide import asked, decide
from qpass.errors import QpassError
from qpass.inspect.branches import Products
from qpass.passes.other_sites import LOOKUP
from qpass.plan import Decision, Plan
from qpass.planning import RecipeLike, run_example
from qpass.processes import count
from qpass.schemes import Recipe, Scheme
from qpass.search.kept import Kept
from qpass.site_info import SiteInfo

FLOAT = "float"
SCHEMES = "schemes such as 'w4a16' and 'w8a8', and None for float"


def parsed(candidates: object) -> dict[str, Scheme | None]:
    """Name -> scheme of each candidate, in the order given; None is called `float`."""
    if isinstance(candidates, str | Scheme) or not isinstance(candidates, Iterable):
        raise QpassError(f"candidates={candidates!r}; expected a list of {SCHEMES}.")
    schemes = [None if each is None else Scheme.parse(each) for each in candidates]
    found = {FLOAT if scheme is None else str(scheme): scheme for scheme in schemes}
    if not any(found.values()):
        raise QpassError(f"candidates={candidates!r} has no scheme; expected a list of {SCHEMES}.")
    return found


@dataclass(frozen=True)
class Prepared:
    """Each candidate's plan, by its name, and what simulates it. fixed: the sites that the caller's recipe decides on.

    special: tables and output layers, which a recipe has to name.
    """

    schemes: Mapping[str, Scheme | None]
    plans: Mapping[str, Plan]
    fixed: frozenset[str]
    special: frozenset[str]
    weights: Mapping[str, Tensor]
    products: dict[str, Products] = field(default_factory=dict)

    def decisions(self, name: str) -> Mapping[str, Decision]:
        """What a candidate does; float does what any does, without integers."""
        if name == FLOAT:
            plan = next(iter(self.plans.values()))
            return {d.site: d if d.site in self.fixed else d.as_float("the search leaves it in float") for d in plan}
        return self.plans[name].decisions


def prepare(
    model: nn.Module,
    schemes: Mapping[str, Scheme | None],
    example_inputs: Batch | None,
    calibration: Sequence[Batch] | None,
    recipe: RecipeLike,
    tables: bool,
    kept: Kept,
) -> Prepared:
    """The plans of all candidates, from one pass over the batches."""
    checks.check_model(model)
    if count() > 1:
        raise QpassError(f"search runs in one process, not in {count()}; call it in one, and share what it finds.")
    session = _observed(model, example_inputs, calibration)
    first = next(s for s in schemes.values() if s is not None)
    rules = Recipe.parse(recipe, first)
    named = [n for n, i in session.sites.items() if i.operation in ("linear", LOOKUP) or i.walk]
    Recipe(rules.rules, None).check(named)
    ruled = len(rules.rules)
    fixed = frozenset(n for n in session.sites if len(rules.unmatched([n])) < ruled)
    ask = asked(model, session.sites, Recipe(rules.rules, first))
    special = frozenset(ask.why) - fixed
    plans: dict[str, Plan] = {}
    with buffers_kept(model):
        wanted = [(name, scheme) for name, scheme in schemes.items() if scheme is not None]
        for name, scheme in shown(wanted, "rounding", lambda pair: pair[0]):
            known = kept.plan(name)
            own = tuple((site, scheme) for site in session.sites if tables and site in special)
            plans[name] = known or decide(
                model, session.sites, Recipe((*rules.rules, *own), scheme), session.observations
            )
            if known is None:
                kept.keep_plan(name, plans[name])
    chosen = Prepared(schemes, plans, fixed, special, ask.weights, {n: Products(p) for n, p in plans.items()})
    _check_taken(chosen, session.sites)
    return chosen


def _observed(model: nn.Module, example_inputs: Batch | None, calibration: Sequence[Batch] | None) -> Session:
    session = Session(model)
    session.observations.moments = calibration is not None
    with buffers_kept(model):
        run_example(session, model, example_inputs)
        if calibration is not None:
            checks.check_counts([observe(session, checks.checked(model, calibration))])
    checks.check_sites(model, session.sites)
    return session


def _check_taken(found: Prepared, sites: Mapping[str, SiteInfo]) -> None:
    """Each scheme has a site that can take it."""
    for name, plan in found.plans.items():
        if not any(d.quantized and d.site not in found.fixed for d in plan):
            whys = dict.fromkeys(f"{d.site}: {d.why}" for d in plan if d.why and not d.is_output)
            raise QpassError(
                f"candidates: no site of this {len(sites)} can take {name}; leave it out, or pass tables=True if only tables "
                f"and output layers are left. {'; '.join(list(whys)[:3])}"
            )


def simulated(prepared: Prepared, chosen: Mapping[str, str]) -> dict[str, Products | None]:
    """Site -> whose product stands for it, of a choice of candidates by site."""
    return {site: None if name == FLOAT else prepared.products[name] for site, name in chosen.items()}
