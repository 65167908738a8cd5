"""Tables on a terminal and in a pipe: on a terminal as wide as it is, in a pipe one line a row, nothing cut off."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table

IN_A_PIPE = 100_000


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], right: Sequence[int] = ()) -> None:
    """Prints rows of text under heads; columns whose index is in `right` are right-aligned."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, head in enumerate(heads):
        made.add_column(head, justify="right" if i in right else "left", overflow="fold")
    for row in rows:
        made.add_row(*row)
    console(made)


def console(shown: RenderableType) -> None:
    """Prints what rich renders."""
    width = None if sys.stdout.isatty() else IN_A_PIPE
    made = Console(width=width, highlight=False, markup=False)
    with made.capture() as capture:
        made.print(shown)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))
