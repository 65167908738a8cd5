"""Images as the native kernels read and write them: [B, C, *spatial] whose channels lie side by side in memory."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Those of a channels-last tensor [B, C, *spatial].

    >>> strides((2, 3, 4, 5))
    (60, 1, 15, 3)
    """
    found, step = [1], max(shape[1], 1)
    for size in shape[:1:-1]:
        found.append(step)
        step *= max(size, 1)
    return (step, found[0], *found[:0:-1])


def channels_last(x: Tensor) -> Tensor:
    """[B, C, *spatial] with the channels of a pixel side by side."""
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def three(values: Sequence[int], filler: int) -> tuple[int, ...]:
    """One to three values as three, fillers in front: an image is a volume one deep.

    >>> three([3, 5], 1)
    (1, 3, 5)
    """
    return (*[filler] * (3 - len(values)), *values)
