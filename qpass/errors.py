"""The one exception qpass raises for bad input, and the "did you mean" that goes with it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QpassError(ValueError):
    """Bad input: the message names the site or argument, what was expected, and what to do."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """A suggestion to append to a message: the choice spelled most like `word`, or nothing.

    >>> nearest("w8a9", ("w8a8", "fp8"))
    " Did you mean 'w8a8'?"
    >>> nearest("resnet", ("w8a8", "fp8"))
    ''
    """
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""
