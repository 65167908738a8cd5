"""What a monitor has to say: one row for each static input, the worst first, as data and as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from qpass.serving.collect import Stats
from qpass.serving.drift import DRIFT, Limits, Verdict
from qpass.serving.taps import Tap

ORDER = (DRIFT, "unknown", "ok", "too few")


@dataclass(frozen=True)
class SiteDrift:
    """One static input. site: the first that reads it; sites: all. verdict: see drift.py. grid: the limits of its codes."""

    site: str
    sites: tuple[str, ...]
    verdict: Verdict
    stats: Stats
    grid: tuple[float, float]

    @property
    def status(self) -> str:
        """`drift`, `ok`, `too few` looks to say, or `unknown`: no histogram of calibration."""
        return self.verdict.status

    @property
    def psi(self) -> float | None:
        """The population stability index against calibration."""
        return self.verdict.psi

    @property
    def kl(self) -> float | None:
        """KL(seen || calibration), nats."""
        return self.verdict.kl

    @property
    def clipped(self) -> float:
        """The share of values beyond the grid."""
        return self.stats.clipped

    def __str__(self) -> str:
        """A sentence."""
        index = "" if self.psi is None else f"PSI {self.psi:.3f}, "
        return (
            f"{self.site}: {index}{self.clipped:.3%} of its input clipped, values {self.stats.grid.lo:.3g} .. "
            f"{self.stats.grid.hi:.3g} on a grid of {self.grid[0]:.3g} .. {self.grid[1]:.3g}"
        )


def row(tap: Tap, stats: Stats, verdict: Verdict) -> SiteDrift:
    """What is known of a tap."""
    return SiteDrift(tap.site, tap.sites, verdict, stats, tap.limits)


@dataclass(frozen=True)
class DriftReport:
    """rows: one a static input, the worst first. looks, calls, errors: counts. share: of the time of serving spent on looks.
    error: the last that observing has met; the caller never sees one.
    """

    rows: tuple[SiteDrift, ...]
    limits: Limits
    calls: int
    looks: int
    share: float
    errors: int = 0
    error: str = ""
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[SiteDrift]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def drifting(self) -> tuple[SiteDrift, ...]:
        """The inputs that are not what calibration saw."""
        return tuple(r for r in self.rows if r.status == DRIFT)

    def __str__(self) -> str:
        """A head, then a table."""
        head = (
            f"{len(self.drifting)} of {len(self.rows)} static inputs drift; {self.looks} of {self.calls} calls looked at, "
            f"{self.share:.2%} of the time of serving"
        )
        lines = [head, *(f"  note: {note}" for note in self.notes)]
        if self.errors:
            lines.append(f"  {self.errors} looks failed, the last: {self.error}")
        table = [("input of", "status", "PSI", "noise", "clipped", "was", "values", "grid", "samples")]
        table += [_cells(r) for r in self.rows]
        widths = [max(len(cells[i]) for cells in table) for i in range(len(table[0]))]
        lines += ["  ".join(cell.ljust(w) for cell, w in zip(cells, widths, strict=True)).rstrip() for cells in table]
        return "\n".join(lines)


def report(rows: list[SiteDrift], limits: Limits, *more, **named) -> DriftReport:
    """The report of some rows."""
    ordered = sorted(rows, key=lambda r: (ORDER.index(r.status), -r.verdict.times(limits)))
    return DriftReport(tuple(ordered), limits, *more, **named)


def _cells(r: SiteDrift) -> tuple[str, ...]:
    known = r.verdict.psi is not None and r.verdict.noise is not None
    more = f" and {len(r.sites) - 1} more" if len(r.sites) > 1 else ""
    return (
        r.site + more,
        r.status,
        f"{r.verdict.psi:.3f}" if known else "",
        f"{r.verdict.noise:.3f}" if known else "",
        f"{r.clipped:.3%}",
        f"{max(r.clipped - r.verdict.excess, 0):.3%}",
        f"{r.stats.grid.lo:.3g} .. {r.stats.grid.hi:.3g}" if r.stats.looks else "",
        f"{r.grid[0]:.3g} .. {r.grid[1]:.3g}",
        str(r.stats.samples),
    )
