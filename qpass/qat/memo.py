"""A value that several modules read is fake-quantized once in a forward pass: the result waits for the other readers.

It is held as long as the value itself lives and a reader is left that has not had it; so nothing is left when a step is over.
A reader that comes a second time belongs to another pass over the same value (activation checkpointing, a second loss), which
has a graph of its own: it gets nothing, and begins anew.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

from torch import Tensor


class Memo:
    """The result for the value seen last."""

    def __init__(self) -> None:
        self.value: weakref.ref[Tensor] | None = None
        self.state: Hashable = None
        self.result: list[Tensor] = []  # emptied when the value dies
        self.had: set[int] = set()

    def get(self, value: Tensor, state: Hashable, reader: int, readers: int) -> Tensor | None:
        """The result of the same value in the same state, for a reader (its id) that has not had it."""
        known = bool(self.result) and self.value() is value and self.state == state and reader not in self.had
        if not known:
            return None
        result = self.result[0]
        self.had.add(reader)
        if len(self.had) >= readers:
            self.result.clear()
        return result

    def put(self, value: Tensor, state: Hashable, reader: int, result: Tensor) -> None:
        """What the reader has made is there for the others."""
        held = [result]
        self.value = weakref.ref(value, lambda _: held.clear())
        self.state, self.result, self.had = state, held, {reader}

    def __reduce__(self) -> tuple[Any, ...]:
        return Memo, ()
