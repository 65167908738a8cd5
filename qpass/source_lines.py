"""The line of a model's own source that a node of a graph comes from, as the front end wrote it down in the stack trace."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import PurePath

from torch import fx

FRAME = re.compile(r'File "([^"]+)", line (\d+), in [^\n]*\n +([^\n]+)')
OURS = ("qpass/capture.py", "torch/nn/modules/")
LAST = 3  # frames that are looked at


@dataclass(frozen=True)
class SourceLine:
    """file: its name without the folder."""

    file: str
    line: int
    code: str


def source_line(trace: str | None) -> SourceLine | None:
    """The innermost frame of a stack trace that is neither torch's modules nor the front end's; None where there is none.

    >>> source_line('  File "/home/nets.py", line 7, in forward\\n    return self.up(x)\\n')
    SourceLine(file='nets.py', line=7, code='return self.up(x)')
    """
    if not trace:
        return None
    start = len(trace)
    for _ in range(LAST):
        start = trace.rfind('File "', 0, start)
        found = FRAME.match(trace, start) if start >= 0 else None
        if found is None:
            return None
        if not any(ours in found[1].replace("\\", "/") for ours in OURS):
            return SourceLine(PurePath(found[1]).name, int(found[2]), found[3].strip())
    return None


def source_lines(sites: Mapping[str, fx.Node]) -> dict[str, SourceLine]:
    """Site -> its line, for those that have one."""
    found = {name: source_line(node.meta.get("stack_trace")) for name, node in sites.items()}
    return {name: line for name, line in found.items() if line is not None}
