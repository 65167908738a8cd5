"""Run passes in order, and after each: verify, write the graph down, compare its results with the step before.

QPASS_CHECK   structure (default): verify each level; numeric: also run the inputs after each pass; off
QPASS_DUMP    a folder: each pass leaves NN_pass.txt there
QPASS_LOG     rules: hits and nearest misses of the rewrite rules, on standard error
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qpass.errors import QpassError, nearest
from qpass.graph_text import text
from qpass.rewrite import RuleLog
from qpass.sites import module_path
from qpass.verify import LEVELS, verify

CHOICES = (("QPASS_CHECK", ("structure", "numeric", "off")), ("QPASS_LOG", ("", "rules")))


@dataclass(frozen=True)
class Pass:
    """needs, leaves: levels. tolerance: how far results may move, as relative RMS (0: not a bit); None: it may change
    them (insert-qdq alone).
    """

    name: str
    needs: str
    leaves: str
    run: Callable[[fx.GraphModule, Any], int]
    tolerance: float | None = 0.0


@dataclass(frozen=True)
class Settings:
    """The three environment variables, validated."""

    check: str = "structure"
    dump: str = ""
    log: str = ""

    @staticmethod
    def from_env() -> Settings:
        """Reads QPASS_CHECK, QPASS_DUMP and QPASS_LOG."""
        values = {}
        for name, choices in CHOICES:
            value = os.environ.get(name, choices[0])
            if value not in choices:
                raise QpassError(
                    f"{name}={value!r} is not one of {', '.join(filter(None, choices))}.{nearest(value, choices)}"
                )
            values[name] = value
        dump = os.environ.get("QPASS_DUMP", "")
        if dump:
            _dump(Path(dump), None, "")
        return Settings(values["QPASS_CHECK"], dump, values["QPASS_LOG"])


@dataclass(frozen=True)
class Step:
    """What a pass left. modules: of each call in the text, in order, the path of the module that it comes from."""

    name: str
    level: str
    text: str
    edits: int
    seconds: float
    modules: tuple[str, ...] = ()


@dataclass
class Context:
    """What passes may read beside the graph, and what is written down of them."""

    graph_name: str = "graph"
    settings: Settings = field(default_factory=Settings)
    plan: Any = None
    backend: Any = None
    names: Any = None
    steps: list[Step] = field(default_factory=list)
    log: RuleLog = field(default_factory=RuleLog)
    kept: list[tuple[str, str]] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    sites: dict[str, Any] = field(default_factory=dict)


def run_pipeline(
    gm: fx.GraphModule, passes: Sequence[Pass], context: Context, inputs: Sequence[Any] | None = None
) -> fx.GraphModule:
    """The graph after every pass. inputs: real values of its placeholders, for QPASS_CHECK=numeric."""
    level = LEVELS[0]
    _record(gm, context, "capture", level, 0, 0.0)
    numeric = context.settings.check == "numeric" and inputs is not None
    expected = _results(gm, inputs) if numeric else None
    for each in passes:
        if each.needs != level:
            raise QpassError(f"pass {each.name} needs a graph at level {each.needs}, not {level}; see passes.ORDER.")
        start = time.perf_counter()
        try:
            edits = each.run(gm, context)
            gm.recompile()
            if context.settings.check != "off":
                verify(gm, each.leaves)
        except Exception as error:
            error.add_note(f"qpass: in pass {each.name} of {context.graph_name}; last rules: {context.log.hits[-3:]}")
            raise
        level = each.leaves
        _record(gm, context, each.name, level, edits, time.perf_counter() - start)
        if numeric:
            found = _results(gm, inputs)
            _compare(each, expected, found)
            expected = found
    if context.settings.log == "rules":
        print("\n".join(f"{context.graph_name}: {line}" for line in context.log.lines()), file=sys.stderr)
    return gm


def _record(gm: fx.GraphModule, context: Context, name: str, level: str, edits: int, seconds: float) -> None:
    modules = tuple(module_path(node) for node in gm.graph.nodes if node.op == "call_function")
    step = Step(name, level, text(gm), edits, seconds, modules)
    if context.settings.dump:
        folder = Path(context.settings.dump) / context.graph_name
        _dump(folder, f"{len(context.steps):02d}_{name}.txt", step.text + "\n")
    context.steps.append(step)


def _dump(folder: Path, name: str | None, content: str) -> None:
    """Writes a text into a folder, made where it is missing; without a name, only makes it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if name is not None:
            (folder / name).write_text(content)
    except OSError as error:
        raise QpassError(f"QPASS_DUMP: cannot write to {folder}: {error.strerror}; name another folder.") from error


def _results(gm: fx.GraphModule, inputs: Sequence[Any]) -> list[Tensor]:
    copies = [v.detach().clone() if isinstance(v, Tensor) else v for v in inputs]
    with torch.no_grad():
        out = gm(*copies)
    return [v for v in (out if isinstance(out, tuple | list) else (out,)) if isinstance(v, Tensor)]


def _compare(each: Pass, expected: list[Tensor], found: list[Tensor]) -> None:
    if each.tolerance is None:
        return
    for i, (before, after) in enumerate(zip(expected, found, strict=True)):
        if torch.equal(before, after) or before.numel() == 0:
            continue
        error = (before.double() - after.double()).norm() / before.double().norm().clamp(min=1e-30)
        if not float(error) <= each.tolerance:
            raise QpassError(
                f"pass {each.name} moved output {i} by {float(error):.2e} (relative RMS); it may move it by "
                f"{each.tolerance:.0e}. Set QPASS_DUMP to see the graphs."
            )
