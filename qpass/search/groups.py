"""Sites that must agree: they read one input (one quantize, one merged kernel), or one weight (tied, or called twice)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qpass.search.candidates import FLOAT, Prepared


@dataclass(frozen=True)
class Group:
    """name: of its first site. takes: the candidates that quantize one of its sites at least, and float where it may be."""

    name: str
    sites: tuple[str, ...]
    takes: tuple[str, ...]


def groups(prepared: Prepared) -> list[Group]:
    """The groups that there is something to choose for, in order of execution."""
    import networkx  # a tenth of a second to import

    plans = list(prepared.plans.values())
    places = [d.site for d in plans[0] if not d.is_output and d.weight and d.site not in prepared.fixed]
    together = networkx.Graph()
    for site in places:
        together.add_node(("site", site))
        for plan in plans:
            d = plan.decisions[site]
            together.add_edge(("site", site), ("input", d.group or site))
            together.add_edge(("site", site), ("weight", d.weight))
    order = {site: i for i, site in enumerate(places)}
    parts = [[name for kind, name in part if kind == "site"] for part in networkx.connected_components(together)]
    found = []
    for part in sorted((sorted(part, key=order.__getitem__) for part in parts), key=lambda part: order[part[0]]):
        takes = [name for name, plan in prepared.plans.items() if any(plan.decisions[site].quantized for site in part)]
        floats = FLOAT in prepared.schemes or not takes
        if takes:
            found.append(Group(part[0], tuple(part), (*takes, *([FLOAT] if floats else []))))
    return found


def by_site(found: list[Group], chosen: Mapping[str, str]) -> dict[str, str]:
    """Site -> candidate, of a choice by group."""
    return {site: chosen[group.name] for group in found for site in group.sites}
