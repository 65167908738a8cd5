"""The rows of a weight in chunks, each rounded by itself: several processes can take turns with them.

How many rows a chunk has is part of the result, since a solver stops when the rows before it gain no more. So chunks are the
same for one process and for many. Rounding 4096 rows in four chunks took no longer than at once, measured on two cores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from qpass.qparams import QParams

ROWS = 1024
Rounded = tuple[Tensor, QParams]
Each = Callable[[Callable[[Tensor], Rounded], Sequence[Tensor]], Iterable[Rounded]]
_EACH: ContextVar[Each] = ContextVar("each", default=map)


@contextmanager
def by(each: Each) -> Iterator[None]:
    """Within it `each(work, chunks)` does the work in `map`'s stead, such as with other processes."""
    token = _EACH.set(each)
    try:
        yield
    finally:
        _EACH.reset(token)


def in_chunks(work: Callable[[Tensor], Rounded], weight: Tensor) -> Rounded:
    """(codes, parameters) of a weight [N, K] whose rows have scales of their own; work: the same for some of its rows."""
    parts = list(_EACH.get()(work, weight.split(ROWS)))
    if len(parts) == 1:
        return parts[0]
    params = [part for _, part in parts]
    zeros = [part.zero for part in params if part.zero is not None]
    scale = torch.cat([part.scale for part in params])
    return torch.cat([codes for codes, _ in parts]), QParams(scale, torch.cat(zeros) if zeros else None, params[0].type)
