"""What the training benchmark measured, one record a run, kept in results/training.json; tables and plots are made of it.

A record is {task, seed, scheme, method, distilled, score, control, curve, date, where}; scheme `float` is the control, and
`control` the score of the one of the same run. A new record takes the place of one with the same first five, so that a table
grows over days, a seed or a scheme at a time.
"""

from __future__ import annotations

import datetime
import json
import statistics
from pathlib import Path
from typing import Any

from minilm import between, markdown, where
from training_curves import plot
from training_tasks import Task

from qpass.files import locked, replacing

ROOT = Path(__file__).resolve().parents[2]
KEPT = ROOT / "tests/benchmarks/results/training.json"
PAGE = ROOT / "docs/training.md"
NAMES = ("task", "seed", "scheme", "method", "distilled")
Record = dict[str, Any]


def record(
    task: Task, seed: int, scheme: str, how: tuple[str, bool], scores: tuple[float, float], curve: list[Any]
) -> Record:
    """One run, today's. how: (method, distilled), of the control ("", False); scores: its own, its control's."""
    rounded = [{name: float(f"{value:.5g}") for name, value in at.items()} for at in curve]
    names = dict(zip(NAMES, (task.name, seed, scheme, *how), strict=True))
    score, control = scores
    return {
        **names,
        "score": score,
        "control": control,
        "curve": rounded,
        "date": datetime.date.today().isoformat(),
        "where": where(),
    }


def kept() -> list[Record]:
    """The records there are."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else []


def keep(new: list[Record]) -> None:
    """Writes records beside those there are, whole or not at all; two processes that do so wait for each other."""
    place = lambda r: tuple(r[name] for name in NAMES)
    with locked(KEPT.parent, alone=True):
        found = {place(r): r for r in [*kept(), *new]}
        lines = ",\n".join(json.dumps(found[at]) for at in sorted(found))
        with replacing(KEPT) as part:
            part.write_text(f"[\n{lines}\n]\n")


def table(task: Task, records: list[Record], how: tuple[str, bool]) -> str:
    """One row a scheme: how much worse than the control of the same run it is on average, the spread, the goal."""
    mine = [r for r in records if r["task"] == task.name]
    controls = [r["score"] for r in mine if r["scheme"] == "float"]
    rows = [("scheme", f"worse than float, {task.unit}", "smallest .. largest", "wanted", "seeds")]
    rows.append(("float", f"{_mean(controls)} itself", _spread(controls), "", f"{len(controls)}"))
    for scheme, goal in task.schemes.items():
        runs = [r for r in mine if r["scheme"] == scheme and (r["method"], r["distilled"]) == how]
        worse = [(1 if task.lower_is_better else -1) * (r["score"] - r["control"]) for r in runs]
        if worse:
            rows.append((scheme, _mean(worse), _spread(worse), "" if goal is None else f"{goal}", f"{len(worse)}"))
    return f"{task.name}, {how[0]}, {'distilled' if how[1] else 'labels alone'}:\n\n{markdown(rows)}"


def _mean(values: list[float]) -> str:
    return f"{statistics.fmean(values) + 0.0:.4f}"  # no -0.0


def _spread(values: list[float]) -> str:
    return f"{min(values) + 0.0:.4f} .. {max(values) + 0.0:.4f}"


def report(known: list[Task]) -> None:
    """Tables of all records into the page of docs, and the curves of each task's first seed as a plot."""
    records = kept()
    page = PAGE.read_text()
    for part in ("CNNs", "byte GPT"):
        some = [t for t in known if (t.name == "gpt") == (part == "byte GPT")]
        page = _between(page, part, "\n\n".join(_of_part(some, records)))
    with replacing(PAGE) as out:
        out.write_text(page)
    curves: dict[str, Any] = {}
    for r in [r for r in records if r["seed"] == 0]:
        curves.setdefault(r["task"], {})[f"{r['scheme']} {r['method']}".strip()] = r["curve"]
    plot(curves, KEPT.with_suffix(".png"))


def _of_part(some: list[Task], records: list[Record]) -> list[str]:
    found = []
    for task in some:
        mine = [r for r in records if r["task"] == task.name]
        ways = sorted({(r["method"], r["distilled"]) for r in mine if r["scheme"] != "float"})
        found += [table(task, records, how) for how in ways]
    days = sorted({(r["date"], r["where"]) for r in records if r["task"] in {t.name for t in some}})
    return [*found, *(f"{date}: {place}." for date, place in days)]


def _between(page: str, part: str, text: str) -> str:
    begin, end = (f"<!-- tables of the {part}: {mark} -->\n" for mark in ("begin", "end"))
    return between(page, begin, end, f"{text}\n") if text else page
