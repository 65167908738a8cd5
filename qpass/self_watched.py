"""A graph that looks after the tensors folded into it by itself, where no Watch of a whole model does; and what a capture is
given.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qpass.capture import held

CHANGED = (
    "a weight of this compiled model was replaced or written to after qpass.compile: it runs uncompiled from now on; "
    "compile it again for speed"
)


def all_real(inputs: Sequence[Any]) -> bool:
    """Whether the tensors of a capture hold values (the front end's own export does not)."""
    from torch._subclasses import FakeTensor

    return not any(isinstance(value, FakeTensor) for value in inputs)


def empty(value: Any) -> bool:
    """Whether a tensor has no rows."""
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 0


def hint(value: Any) -> Any:
    """The size a symbolic size has in the example."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def watched(function: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any], frozen: tuple[int, ...]):
    """`function`, or the captured graph in eager mode from the moment a tensor folded into it has changed.

    inputs: the graph's, then the tensors it holds itself; the result takes the first of these alone.
    """
    own = tuple(held(gm).values())
    watch = tuple((i, inputs[i], inputs[i]._version) for i in frozen if isinstance(inputs[i], Tensor))
    warned: list[str] = []

    def run(*given: Any) -> Any:
        args = given + own
        for i, tensor, version in watch:
            if args[i] is not tensor or tensor._version != version:
                break
        else:
            return function(*args)
        if not warned:
            warned.append(CHANGED)
            warnings.warn(CHANGED, stacklevel=2)
        return gm(*given)

    return run
