"""The widths of a nested weight as text: `{8,4,2}` in `w{8,4,2}a16` and in `u{8,4,2}/g128`, and what is wrong with others."""

from __future__ import annotations

from collections.abc import Sequence

WIDTHS = (8, 4, 2)
HALF = 4  # the upper bits of 8 that are a code too
SPELLED = r"\{([^{}]*)\}"  # what stands between braces


def parse_widths(inside: str) -> tuple[int, ...] | str:
    """The widths that stand between braces, or what is wrong with them.

    >>> parse_widths("8,4,2")
    (8, 4, 2)
    >>> parse_widths("4,8")
    'widths go down, from the most bits to the fewest: {8,4}'
    """
    words = inside.split(",")
    if not all(word.isascii() and word.isdigit() and len(word) == 1 for word in words):
        return "widths are whole numbers of bits from 8 to 2 with commas between them: {8,4,2}"
    widths = tuple(map(int, words))
    return why_no_widths(widths) or widths


def why_no_widths(widths: Sequence[int]) -> str | None:
    """None where a weight can be nested so, or why not."""
    other = next((width for width in widths if width not in WIDTHS), None)
    if other is not None:
        return f"a weight that is kept in several widths has {', '.join(map(str, WIDTHS))} of them, not {other}"
    ordered = sorted(set(widths), reverse=True)
    if list(widths) != ordered:
        return f"widths go down, from the most bits to the fewest: {spelled(ordered)}"
    if len(widths) < 2:
        return f"one width has nothing nested in it; write w{widths[0]}a16, or {{8,4,2}}"
    if HALF not in widths:
        return f"{HALF} has to be one of the widths, as codes of 8 bits begin with those of {HALF}: {{8,4,2}}, {{8,4}}"
    return None


def spelled(widths: Sequence[int]) -> str:
    """`{8,4,2}`."""
    return f"{{{','.join(map(str, widths))}}}"
