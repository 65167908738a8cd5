"""True-sequential calibration (GPTQ, 2210.17323, section 4): every linear is rounded on what the rounded ones before it make.

    for each group of sites that read one value, in order of execution
        every batch is run on to that value, through the linears that are rounded already
        observe it, and how far it is from the float model's:   D = E[(x_float - x) x^T]
        decide the group, on weights that first become   W + W D E[x x^T]^-1,   the best answer to what went wrong so far

Each batch is a Walk through the one graph that its call is captured as. Where a call is several graphs, or one weight is
read at several depths, a sentence says so, and calibration is one pass on the float model's values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import fx, nn

from qpass import checks
from qpass.calibrate import Batch, Caught, Session, shown
from qpass.decide import Asked, asked, decide_group, groups
from qpass.observations import Observed
from qpass.padding import unpadded
from qpass.passes.collect_ranges import CollectRanges
from qpass.plan import Decision
from qpass.processes import collected, everywhere, first_alone, spread
from qpass.resume import Checkpoint, batch_digest, batches_digest, finished, save
from qpass.schemes import Recipe
from qpass.site_info import SiteInfo
from qpass.solvers.rows import by
from qpass.walk import Walk, narrow

TRIES = 4  # calls to see whether one is captured as the one before: a size that is new may take two graphs of its own
SEVERAL_GRAPHS = "a call of this model is captured as {} graphs, and only a single one can be stopped at each site"
ANEW = "every call of this model is captured anew: its forward or a hook changes what Python holds, such as a list that grows"
DEPTHS = "{} and {} read one weight at different depths"
CONVOLUTION = "{} is a convolution, and these are rounded from one pass"
ORDERS = "its batches are captured as graphs that reach their sites in different orders"
ONE_PASS = "calibrated in one pass, on the float model's values: {}"
Group = list[SiteInfo]


@dataclass(eq=False)
class Pair:
    """One batch on its way through the model as it is rounded, and through the float model."""

    rounded: Walk
    whole: Walk
    observer: CollectRanges
    nodes: Mapping[str, fx.Node]
    narrow: set[fx.Node]


def solve_in_order(
    model: nn.Module,
    session: Session,
    batches: Iterable[Batch],
    recipe: Recipe,
    checkpoint: Checkpoint | None = None,
) -> dict[str, Decision] | str:
    """The decisions of all linear sites, or why they cannot be taken in order of execution.

    checkpoint: where those of finished groups are kept, and where a run that was interrupted finds them.
    """
    decided: dict[str, Decision] = {}
    pairs: list[Pair] = []
    why = _first(collected(lambda: _begin(session, batches, decided, pairs)))
    if why is not None:
        return why
    checks.check_counts(everywhere(len(pairs)))
    checks.check_same_sites(session.sites)
    ask = asked(model, session.sites, recipe)
    together = groups(ask.sites, session.observations)
    why = _first(everywhere(_why_not(together, session, pairs, ask)))
    if why is not None:
        return why
    known: list[dict[str, Decision]] = []
    if checkpoint is not None:
        checkpoint = _with_batches(checkpoint, model, pairs)
        known = first_alone(finished, checkpoint, together)
    for number, members in enumerate(shown(together, "rounding", lambda group: group[0].name.partition(":")[0])):
        if number < len(known):
            decided |= known[number]
            continue
        _observe(session, pairs, members)
        with by(spread):
            found = decide_group(ask, members, session.observations)
        if checkpoint is not None:
            first_alone(save, checkpoint, number, found)
        decided |= found
        _forget(session, members)
    return decided


def _first(told: Iterable[str | None]) -> str | None:
    """What one process has to say: none goes on where another does not."""
    return next((why for why in told if why), None)


def _begin(
    session: Session, batches: Iterable[Batch], decided: Mapping[str, Decision], pairs: list[Pair]
) -> str | None:
    """Adds every batch at the start of its graph to `pairs`; or says why one is not to be stopped there."""
    for number, batch in enumerate(batches):
        found = caught(session, batch, f"calibration batch {number}")
        if isinstance(found, str):
            return found
        pairs.append(_pair(session, found, number, decided))
    return None


def _with_batches(checkpoint: Checkpoint, model: nn.Module, pairs: list[Pair]) -> Checkpoint:
    """The checkpoint, made of the batches of all processes too."""
    digests = everywhere([batch_digest(pair.rounded.stored.values(), model) for pair in pairs])
    made_of = {**checkpoint.made_of, "calibration batches": batches_digest(d for each in digests for d in each)}
    return Checkpoint(checkpoint.directory, made_of)


def caught(session: Session, batch: Batch, what: str) -> Caught | str:
    """The graph and arguments that a call is captured as, or why there is no single one."""
    for _ in range(TRIES):
        session.catching = True
        try:
            session.run(batch, what)
        except Caught as found:
            if found.index in session.whole:
                return found
        finally:
            session.catching = False
        session.entered, session.watching = [], False
        session.run(batch, what)
        session.watching = True
        if len(session.entered) != 1:
            return SEVERAL_GRAPHS.format(len(session.entered))
        session.whole.add(session.entered[0])
    return ANEW


def _pair(session: Session, found: Caught, number: int, decided: Mapping[str, Decision]) -> Pair:
    graph, nodes, lifted = session.graphs[found.index]
    names = {node: name for name, node in nodes.items()}
    args = (*found.given, *lifted)
    observer = CollectRanges(graph, nodes, session.observations, number, mask=session.mask)
    observer.done = set()
    stops = [node for node in names if node in observer.reads]
    return Pair(Walk(graph, args, names, decided), Walk(graph, args, names, {}), observer, nodes, narrow(graph, stops))


def _why_not(together: list[Group], session: Session, pairs: list[Pair], ask: Asked) -> str | None:
    """None where every group reads one value, and every graph comes to the groups in this order."""
    image = next((i for i in session.sites.values() if i.walk and ask.schemes[i.name] is not None), None)
    if image is not None:
        return CONVOLUTION.format(image.name)
    named = session.observations.groups
    for members in together:
        other = next((m for m in members if named.get(m.name) != named.get(members[0].name)), None)
        if other is not None:
            return DEPTHS.format(members[0].name, other.name)
    for pair in {id(pair.nodes): pair for pair in pairs}.values():
        index = {node: i for i, node in enumerate(pair.rounded.order)}
        places = [
            min(found) for g in together if (found := [index[pair.nodes[m.name]] for m in g if m.name in pair.nodes])
        ]
        if places != sorted(places):
            return ORDERS
    return None


def _observe(session: Session, pairs: list[Pair], members: Group) -> None:
    """Runs all batches on to a group, and takes in what other processes see of it."""
    group = session.observations.groups.get(members[0].name, members[0].name)

    def look() -> Observed | None:
        for pair in pairs:
            _look(session, pair, members)
        return session.observations.observed.get(group)

    found = [seen for seen in collected(look) if seen is not None]
    for other in found[1:]:
        found[0].merge(other)
    if found:
        session.observations.observed[group] = found[0]


def _look(session: Session, pair: Pair, members: Group) -> None:
    """Runs one batch on to the value that a group reads, and observes it."""
    index = {node: i for i, node in enumerate(pair.rounded.order)}
    reads = sorted((pair.nodes[m.name] for m in members if m.name in pair.nodes), key=index.__getitem__)
    if not reads:
        return
    keep = reads[0] in pair.narrow
    x, wanted = pair.rounded.look(reads[0], keep), pair.whole.look(reads[0], keep)
    pair.observer.done.clear()
    for node in reads:
        pair.observer.observe(pair.observer.reads[node][0], x)
    observed = session.observations.together([members[0].name])
    if observed is not None and observed.moment is not None:
        mask = pair.observer.mask
        observed.add_drift(unpadded(x, mask), unpadded(wanted, mask))


def _forget(session: Session, members: Group) -> None:
    """Drops the statistics that only a solver needs: of one group at a time, [K, K] each, they are held."""
    observed = session.observations.together([members[0].name])
    if observed is not None:
        observed.moment = observed.drift = observed.sample = observed.keys = None
