"""qpass.recalibrate: new scales for static inputs from what was seen while serving, between two calls, and back again.

    limits      of the values seen, chosen as the plan's scheme chooses them (range_choice.py)
    scale, zero of these limits; sites that share one quantize, or one value, get the same
    graphs      those that were captured, through the passes and the backend again; then exchanged as a whole

Factors, shifts and copies of channels stay, and so do the integers and the bias corrections: none of these counts on a scale.
No float weight is read, nothing is captured anew. Calls under way end as they began; where a call is several graphs, one that
runs meanwhile may have some of both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qpass.affine import choose_qparams
from qpass.errors import QpassError, nearest
from qpass.plan import Decision, Plan, matches
from qpass.qparams import QParams
from qpass.range_choice import choose_range
from qpass.runtime import Runtime
from qpass.seen import clipped_of, grid, seen_of
from qpass.serving.collect import Stats
from qpass.serving.monitor import Monitor
from qpass.serving.saved import fingerprint
from qpass.serving.start import compiled

MINIMUM = 64  # samples
WHOLE = 8  # bits with steps small enough to make room for all that was seen
FEW = "{} of {} samples were seen of it"
NOTE = "recalibrated while serving: {} of {} static inputs, from up to {} samples each"


@dataclass
class Recalibration:
    """What a recalibration did. before, after: the plans; `r.after[site]` is a decision. sites: those with other scales.
    kept: site -> why it has the scale that it had. `undo()` takes it back.
    """

    before: Plan
    after: Plan
    sites: tuple[str, ...]
    kept: Mapping[str, str]
    _runtime: Runtime = field(repr=False)
    _made: tuple = field(repr=False)
    _undone: bool = False

    def undo(self) -> None:
        """The model as it was before, to the last bit. A monitor of it begins anew."""
        runtime = self._runtime
        with runtime.lock:
            if self._undone:
                raise QpassError("this recalibration is undone already.")
            if runtime.plan is not self.after:
                raise QpassError("another recalibration came after this one; undo that one first.")
            earlier = list(self._made)  # graphs that were captured since are lowered by the plan of before
            earlier += runtime.again(self.before, len(earlier))
            _exchange(runtime, self.before, earlier)
            self._undone = True

    def __str__(self) -> str:
        """A head, then limits before and after, one site a line."""
        lines = [f"{len(self.sites)} static inputs have new scales, {len(self.kept)} keep theirs"]
        for name in self.sites:
            old, new = (grid(*_held(plan[name])) for plan in (self.before, self.after))
            lines.append(f"  {name}: {old[0]:.3g} .. {old[1]:.3g}  ->  {new[0]:.3g} .. {new[1]:.3g}")
        return "\n".join([*lines, *(f"  kept: {name}: {why}" for name, why in self.kept.items())])


def recalibrate(model: nn.Module, monitor: Monitor, sites: str = "*", minimum: int = MINIMUM) -> Recalibration:
    """New scales for the static inputs of a compiled model, from what its monitor has seen; the model runs by them at once.

    sites: a glob of module paths or site names. Those that share a scale with one of them get the new one too. minimum:
    samples that must have been seen of an input; one that has fewer keeps its scale, and `kept` of the result says so. Raises
    QpassError where no input has as many.
    """
    runtime = compiled(model)
    _check(runtime, monitor, minimum)
    with runtime.lock:
        plan, seen = runtime.plan, monitor.seen()
        chosen = _chosen(plan, sites)
        new: dict[str, Decision] = {}
        kept: dict[str, str] = {}
        for members in _together(plan, monitor):
            if not chosen & set(members):
                continue
            stats = {name: seen[name] for name in members if name in seen and seen[name].samples}
            samples = sum(s.samples for s in stats.values())
            if samples < minimum:
                kept |= dict.fromkeys(members, FEW.format(samples, minimum))
            else:
                new |= _decided(plan, members, stats, monitor)
        if not new:
            most = max((s.samples for s in seen.values()), default=0)
            raise QpassError(
                f"recalibrate needs {minimum} samples of an input, and the monitor has seen {most} at most; let the model "
                "serve longer, watch with a larger share=, or give a smaller minimum=."
            )
        after = _with(plan, new, max(s.samples for s in seen.values()))
        before = tuple(runtime.made)
        _exchange(runtime, after, runtime.again(after))
        return Recalibration(plan, after, tuple(new), kept, runtime, before)


def _check(runtime: Runtime, monitor: Monitor, minimum: int) -> None:
    if not isinstance(monitor, Monitor):
        raise QpassError(f"recalibrate got a {type(monitor).__name__}; expected what qpass.monitor returned.")
    if not isinstance(minimum, int) or isinstance(minimum, bool) or minimum < 1:
        raise QpassError(f"minimum={minimum!r}: expected a whole number of samples, at least 1.")
    if monitor.plan is not runtime.plan and fingerprint(monitor.plan) != fingerprint(runtime.plan):
        raise QpassError(
            "what this monitor saw is of another plan: of another model, or of this one before a recalibration; pass one "
            "that qpass.monitor made of the model as it is."
        )
    watch = runtime.watch() if runtime.watch else None
    if watch is None or watch.changed():
        raise QpassError("a weight of this model was replaced or written to after qpass.compile; compile it again.")


def _chosen(plan: Plan, glob: str) -> set[str]:
    static = [d.site for d in plan if d.static]
    found = {name for name in static if matches(name, glob)}
    if not found:
        raise QpassError(f"no static input of the plan matches sites={glob!r}.{nearest(glob, static)}")
    return found


def _together(plan: Plan, monitor: Monitor) -> Iterator[list[str]]:
    """Static decisions that must have one scale: they share a quantize, a value or a weight, and have it now."""
    import networkx  # a tenth of a second to import

    joined = networkx.Graph()
    for d in plan:
        if d.static:
            key = (str(d.input_type), float(d.input_scale), 0 if d.input_zero is None else int(d.input_zero))
            joined.add_edge(("site", d.site), ("group", d.group or d.site, key))
            if d.weight:
                joined.add_edge(("site", d.site), ("weight", d.weight, key))
    for tap in monitor.taps.values():
        joined.add_edges_from((("site", tap.site), ("site", name)) for name in tap.sites)
    order = {d.site: i for i, d in enumerate(plan)}
    for part in networkx.connected_components(joined):
        yield sorted((node[1] for node in part if node[0] == "site"), key=order.__getitem__)


def _decided(plan: Plan, members: list[str], stats: Mapping[str, Stats], monitor: Monitor) -> dict[str, Decision]:
    """The decisions of sites that share a scale, with the new one."""
    whole = Stats()
    for each in stats.values():
        whole = whole.merge(dataclasses.replace(each, bins=None))  # bins are of each value by itself
    lead = plan[next(iter(stats))]
    params = _params(plan, lead, whole)
    lo, hi = grid(params.scale, params.zero, params.type)
    found = {}
    by_site = {name: tap.site for tap in monitor.taps.values() for name in tap.sites}
    for name in members:
        own = stats.get(by_site.get(name, name), whole)
        clipped = 0.0 if plan[name].input_extra is not None else clipped_of(own.grid, lo, hi)
        found[name] = dataclasses.replace(
            plan[name],
            input_scale=params.scale,
            input_zero=params.zero,
            lo=own.source.lo,
            hi=own.source.hi,
            seen=seen_of(own.source, clipped),
        )
    return found


def _params(plan: Plan, d: Decision, seen: Stats) -> QParams:
    """Scale and zero point of what was seen, with the range that the plan's scheme chooses."""
    assert d.input_type is not None
    if (
        d.input_extra is not None and seen.reach is not None
    ):  # copies carry what is beyond the first, see solvers/split.py
        top = (seen.reach / (1 + d.input_extra.to(seen.reach))).max()
        return choose_qparams(torch.tensor(seen.grid.lo), top, d.input_type)
    scheme = dataclasses.replace(plan.scheme, activation=d.input_type)
    linear = d.operation == "linear"
    method = scheme.range_for("linear" if linear else "convolution")
    if linear and d.packed is not None and d.packed.in_mul is not None and d.input_type.bits < WHOLE:
        method = "mse"  # as solvers/smooth.py does on its sampled rows
    return choose_qparams(*choose_range(seen.grid, d.input_type, method), d.input_type)


def _with(plan: Plan, new: Mapping[str, Decision], samples: int) -> Plan:
    """The plan with other decisions; one recalibration after another leaves one note."""
    notes = [note for note in plan.notes if not note.startswith(NOTE.partition(":")[0])]
    notes.append(NOTE.format(len(new), sum(d.static for d in plan), samples))
    return dataclasses.replace(plan, decisions={d.site: new.get(d.site, d) for d in plan}, notes=notes)


def _exchange(runtime: Runtime, plan: Plan, made: list) -> None:
    runtime.exchange(plan, made)
    if runtime.monitor is not None:
        runtime.monitor.renew()


def _held(d: Decision) -> tuple[Tensor, Tensor | None, object]:
    return d.input_scale, d.input_zero, d.input_type  # type: ignore[return-value]
