"""Monitor: watches the static inputs of a compiled model while it serves.

    m = qpass.monitor(q)
    ... q(x) as ever ...
    print(m)                                     # or m.report(), m.metrics(), m.save(path)

A call that is looked at runs its captured graphs once more beside, in plain torch (taps.py); its result is the compiled
call's own. One thread looks at a time; the others serve and do not wait. An error on the way to a look is counted and warned
of once, and never reaches the caller.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from qpass.errors import QpassError
from qpass.padding import mask_of
from qpass.plan import Plan
from qpass.runtime import Runtime
from qpass.served import Kept
from qpass.serving import exposition, saved
from qpass.serving.collect import Stats
from qpass.serving.drift import DRIFT, Limits, judge
from qpass.serving.drifts import DriftReport, SiteDrift, report, row
from qpass.serving.sampling import Budget
from qpass.serving.taps import Tap, Watcher
from qpass.serving.window import Look, Window

JUDGED = 8  # looks from one judgement to the next
FAILED = "qpass.monitor could not look at a call, which ran as ever: {}"
RAISED = "on_drift raised {}; the call it came from ran as ever"
UNJUDGED = (
    "the plan holds no histogram of calibration for {} of its inputs: of these only what is clipped is known. Plans of "
    "qpass.analyze with calibration hold them; qpass.recalibrate makes one of what was seen."
)


class Monitor:
    """See the module; made by `qpass.monitor`. Also a context manager, which stops it at the end."""

    def __init__(
        self, model: nn.Module, runtime: Runtime, budget: Budget, limits: Limits, window: int, on_drift: Any = None
    ) -> None:
        self.runtime, self.budget, self.limits, self.window, self.on_drift = runtime, budget, limits, window, on_drift
        self.model = type(model).__name__
        self.errors, self.error = 0, ""
        self._looking, self._data = threading.Lock(), threading.RLock()
        self._local = threading.local()
        self._warned: set[str] = set()
        self.renew()

    def renew(self) -> None:
        """Begins anew, by the plan of now: every graph gets its taps, and what was seen is forgotten."""
        with self._data:
            self.plan: Plan = self.runtime.plan
            self.taps: dict[str, Tap] = {}
            self.reset()
            for kept in self.runtime.kept:
                self.attach(kept)

    def reset(self) -> None:
        """Forgets what was seen."""
        with self._data:
            self._seen, self._drifting = Window(self.window), set()

    def attach(self, kept: Kept) -> None:
        """Watches a captured graph; a look at it that fails does no harm."""
        try:
            watcher = Watcher(kept, self.plan, self.runtime.names)
        except Exception as error:
            self._failed(f"{type(error).__name__}: {error}")
            return
        self.taps = {**self.taps, **{tap.site: tap for tap in watcher.taps.values()}}
        kept.served.look = self._looker(watcher) if watcher.taps else None

    def _looker(self, watcher: Watcher) -> Callable[[tuple[Any, ...]], None]:
        def look(given: tuple[Any, ...]) -> None:
            current: Look | None = getattr(self._local, "look", None)
            if current is None or current.error:
                return
            start = time.perf_counter()
            try:
                for site, stats in watcher.look(given, current.mask, current.at).items():
                    current.found[site] = current.found.get(site, Stats()).merge(stats)
            except Exception as error:
                current.error = f"{type(error).__name__}: {error}"
            current.seconds += time.perf_counter() - start

        return look

    def __call__(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module
    ) -> Any:
        """One call of the model, or of a module that is part of it, looked at or not."""
        if not self.budget.due() or not self._looking.acquire(blocking=False):
            graphs, start = len(self.runtime.kept), time.perf_counter()
            result = call(*args, **kwargs)
            self._served(graphs, time.perf_counter() - start)
            return result
        try:
            result, began = self._looked(call, args, kwargs, module)
        finally:
            self._local.look = None
            self._looking.release()
        self._tell(began)
        return result

    def _looked(
        self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], module: nn.Module
    ) -> tuple[Any, Any]:
        """The result of a call, and the inputs that begin to drift with what it showed."""
        graphs, start, generation = len(self.runtime.kept), time.perf_counter(), self._seen
        look = Look(self.budget.random.random())
        try:
            look.mask = mask_of(module, args, kwargs)
        except Exception as error:
            look.error = f"{type(error).__name__}: {error}"
        self._local.look = look
        before = time.perf_counter()
        result = call(*args, **kwargs)
        seconds = time.perf_counter() - before - look.seconds
        began = self._take(look, generation)
        self._served(graphs, seconds, time.perf_counter() - start - seconds)
        return result, began

    def _served(self, graphs: int, seconds: float, looked: float | None = None) -> None:
        """Counts a call; one that captured a graph on its way is no serving."""
        if len(self.runtime.kept) == graphs:
            self.budget.served(seconds, looked)

    def _take(self, look: Look, seen: Window) -> list[SiteDrift]:
        """Adds what a look found; returns the inputs that begin to drift."""
        if look.error:
            self._failed(look.error)
            return []
        with self._data:
            if seen is not self._seen or not look.found:  # begun anew meanwhile
                return []
            seen.add(look.found)
            return [] if seen.looks % JUDGED else self._judge()

    def _judge(self) -> list[SiteDrift]:
        rows = {r.site: r for r in self._rows()}
        now = {site for site, r in rows.items() if r.status == DRIFT}
        began = [rows[site] for site in sorted(now - self._drifting)]
        self._drifting = now
        return began

    def _tell(self, began: list[SiteDrift]) -> None:
        for each in began if self.on_drift is not None else ():
            try:
                self.on_drift(each)
            except Exception as error:
                self._warn(RAISED.format(f"{type(error).__name__}: {error}"))

    def _failed(self, error: str) -> None:
        with self._data:
            self.errors, self.error = self.errors + 1, error
        self._warn(FAILED.format(error))

    def _warn(self, sentence: str) -> None:
        kind = sentence.partition(" ")[0]
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(sentence, stacklevel=5)

    def seen(self) -> dict[str, Stats]:
        """What was seen of each static input in the window: the last `window` looks, half of them at least."""
        with self._data:
            return dict.fromkeys(self.taps, Stats()) | self._seen.all()

    def _rows(self) -> list[SiteDrift]:
        found = []
        for site, stats in self.seen().items():
            tap = self.taps.get(site)
            if tap is not None:
                verdict = judge(stats, tap.decision.seen, self.limits, site in self._drifting)
                found.append(row(tap, stats, verdict))
        return found

    def report(self) -> DriftReport:
        """Every static input, the worst first."""
        with self._data:
            unjudged = sum(tap.decision.seen is None for tap in self.taps.values())
            notes = (UNJUDGED.format(unjudged),) if unjudged else ()
            b = self.budget
            share = b.looking / b.serving if b.serving else 0.0
            return report(self._rows(), self.limits, b.calls, b.looks, share, self.errors, self.error, notes)

    def __str__(self) -> str:
        return str(self.report())

    def metrics(self) -> str:
        """The report in the text format of Prometheus."""
        b = self.budget
        totals = {
            "qpass_monitor_calls_total": ("Calls served.", b.calls),
            "qpass_monitor_looks_total": ("Calls looked at.", b.looks),
            "qpass_monitor_errors_total": ("Looks that failed.", self.errors),
            "qpass_monitor_serving_seconds_total": ("Seconds of calls.", b.serving),
            "qpass_monitor_looking_seconds_total": ("Seconds of looks.", b.looking),
        }
        return exposition.exposition(self.report(), totals, {"model": self.model})

    def wsgi(self, environ: Mapping[str, Any], start_response: Callable[..., Any]) -> list[bytes]:
        """A WSGI app that answers with `metrics()`: mount it where Prometheus looks."""
        return exposition.respond(self.metrics, environ, start_response)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes what was seen; another process merges it."""
        saved.save(path, self.plan, self.model, self.seen())

    def merge(self, other: Monitor | str | os.PathLike[str]) -> None:
        """Takes in what another monitor of the same plan saw, or a file that it wrote."""
        if isinstance(other, Monitor):
            if saved.fingerprint(other.plan) != saved.fingerprint(self.plan):
                raise QpassError(saved.OTHER.format("what is to be merged").replace("written", "seen"))
            found = other.seen()
        else:
            found = saved.load(other, self.plan)
        with self._data:
            self._seen.add({site: stats for site, stats in found.items() if stats.looks}, looks=0)
            self._judge()

    def stop(self) -> None:
        """Stops watching; what was seen stays."""
        if self.runtime.monitor is self:
            self.runtime.monitor = None
            for kept in self.runtime.kept:
                kept.served.look = None

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
