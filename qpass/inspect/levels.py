"""The nodes of a graph at each level, read from the text that the pipeline wrote down (graph_text.py).

Compiling keeps texts alone; they are parsed when somebody asks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from qpass.pipeline import Step
from qpass.verify import LEVELS

CALL = re.compile(r"^  (%\d+) = ([\w.]+)\((.*?)\)(?:   # (.*))?$")
NAME = re.compile(r"%x?\d+|@[\w.]+")
KIND = re.compile(r"^(\w+)\[(.*)\]$")


@dataclass(frozen=True)
class LevelNode:
    """One node: kind `input`, `parameter`, `call` or `output`. site: joined by + where several were merged; rule: what
    made it; inputs: ids of the nodes it reads; shape: ints, and symbols as text.
    """

    id: int
    kind: str
    op: str
    text: str
    module: str = ""
    site: str | None = None
    rule: str | None = None
    dtype: str | None = None
    shape: tuple[int | str, ...] | None = None
    inputs: tuple[int, ...] = ()

    def data(self) -> dict[str, Any]:
        """As the report's document holds it."""
        lists = {"shape": None if self.shape is None else list(self.shape), "inputs": list(self.inputs)}
        return vars(self) | lists


def last_of_levels(steps: list[Step]) -> list[Step]:
    """The last step of each level that a graph came to, in order."""
    last = {step.level: step for step in steps}
    return [last[level] for level in LEVELS if level in last]


def size(step: Step) -> int:
    """How many lines a graph has: its calls, and two more."""
    return step.text.count("\n") + 1


def nodes(step: Step) -> list[LevelNode]:
    """The nodes of a graph, in order of execution; a parameter in front of who reads it first."""
    ids: dict[str, int] = {}
    found: list[LevelNode] = []

    def add(name: str, *fields: Any, **more: Any) -> None:
        ids[name] = len(found)
        found.append(LevelNode(len(found), *fields, **more))

    def known(text: str, reader: str = "") -> tuple[int, ...]:
        names = list(dict.fromkeys(NAME.findall(text)))
        for name in names:
            if name not in ids:
                add(name, "parameter", "parameter", name, _module_of(name[1:], reader))
        return tuple(ids[name] for name in names)

    head, *lines = step.text.splitlines()
    for name in NAME.findall(head):
        add(name, "input", "input", name)
    modules = iter(step.modules)
    for line in lines:
        call = CALL.match(line)
        if call is None:
            add("", "output", "output", line.strip(), inputs=known(line))
            continue
        name, op, arguments, comment = call.groups()
        module = next(modules, "")
        inputs = known(arguments, module)
        told = dict(_comment(comment or ""))
        add(name, "call", op, line.partition("   # ")[0].strip(), module, inputs=inputs, **told)
    return found


def _module_of(path: str, reader: str) -> str:
    """The module of a parameter by its path; of a constant that a pass made, the one that reads it."""
    own, packed, _ = path.partition(".parametrizations.")
    return own if packed else own.rpartition(".")[0] if "." in own else reader


def _comment(text: str) -> Iterator[tuple[str, Any]]:
    """Dtype and shape, site, rule: what stands behind a line."""
    for part in filter(None, text.split("  ")):
        kind = KIND.match(part)
        if part.startswith("<- "):
            yield "rule", part.removeprefix("<- ")
        elif kind and ":" not in part:
            yield "dtype", kind[1]
            yield "shape", tuple(int(n) if n.isdigit() else n for n in kind[2].split(", ") if n)
        else:
            yield "site", part


def rules_of(steps: list[Step]) -> dict[str, list[str]]:
    """Site -> the rules that made a node of it, in any step, each once."""
    found: dict[str, dict[str, None]] = {}
    for step in steps:
        for line in step.text.splitlines():
            comment = line.partition("   # ")[2]
            told = dict(_comment(comment)) if "<- " in comment else {}
            if "site" in told and "rule" in told:
                for site in told["site"].split("+"):
                    found.setdefault(site, {})[told["rule"]] = None
    return {site: list(rules) for site, rules in found.items()}


def collapsed(found: list[LevelNode], depth: int) -> list[LevelNode]:
    """The graph with one node for all that is in a module `depth` names deep; what is less deep stays as it is.

    depth 2 makes one node of `encoder.layer.0...` if it is called `encoder.layer`. A parameter goes with its module.
    """
    keys = [_module_at(node, depth) for node in found]
    new: dict[str, int] = {}
    ids: list[int] = []
    members: list[list[int]] = []
    for i, key in enumerate(keys):
        at = new.get(key, len(members)) if key else len(members)
        if key:
            new[key] = at
        if at == len(members):
            members.append([])
        members[at].append(i)
        ids.append(at)
    made = []
    for at, inside in enumerate(members):
        first = found[inside[0]]
        inputs = tuple(dict.fromkeys(ids[i] for k in inside for i in found[k].inputs if ids[i] != at))
        key = keys[inside[0]]
        if key:
            first = LevelNode(at, "call", "module", f"{key}: {len(inside)} nodes", key)
        made.append(replace(first, id=at, inputs=inputs))
    return made


def _module_at(node: LevelNode, depth: int) -> str:
    parts = node.module.split(".")
    inside = node.kind in ("call", "parameter") and node.module and len(parts) >= depth
    return ".".join(parts[:depth]) if inside else ""
