"""Torch's own operators on images, held to the layout that their fake values promise.

The generated kernels read values by the strides written down at compile time. An operator such as upsampling chooses
the layout of its result by that of its input, and for a batch or a channel of one its fake value may choose another.
So the result
of such a call is looked at, and copied where it lies differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

FORMATS = {4: torch.channels_last, 5: torch.channels_last_3d}


def laid_out_calls(
    gm: fx.GraphModule, known: Mapping[fx.Node, Any]
) -> dict[fx.Node, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """For each call of torch's operators that makes an image: a function that gives it in the layout written down."""
    found = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node in known or not _is_maker(node) or not isinstance(value, Tensor) or value.dim() not in FORMATS:
            continue
        wanted = next(
            (f for f in (torch.contiguous_format, FORMATS[value.dim()]) if value.is_contiguous(memory_format=f)), None
        )
        if wanted is not None:
            found[node] = (_held_to(node.target, wanted), node.args)
    return found


def _is_maker(node: fx.Node) -> bool:
    """Whether a call makes a new tensor with an operator of torch."""
    schema = getattr(node.target, "_schema", None)
    if node.op != "call_function" or schema is None or not schema.name.startswith("aten::") or schema.is_mutable:
        return False
    return not any(result.alias_info is not None for result in schema.returns)


def _held_to(target: Callable[..., Any], wanted: torch.memory_format) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        y = target(*args, **kwargs)
        return y if y.is_contiguous(memory_format=wanted) else y.contiguous(memory_format=wanted)

    return run
