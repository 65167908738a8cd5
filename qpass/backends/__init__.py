"""Backends: who runs a fused op. The table is BACKENDS; `auto` picks by device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qpass.errors import QpassError, nearest


@dataclass(frozen=True)
class Backend:
    """unavailable: None where it runs on this machine, or why not. why_not: None where it takes a fused node, or why
    not. lower: the nodes that replace one. targets: the ops it is asked about. absorb: edits of its own to a graph that is
    lowered, and their number. finish: a lowered graph -> a callable. channels_last: the ops whose images are laid out
    so; reads_parts: those that read some channels of a wider image where they lie. merges_activations: whether linears that
    read one input are better one launch, their activations behind it, than each with its own. weight_bits: of the scheme
    that is chosen where none is asked for.
    """

    name: str
    unavailable: Callable[[], str | None]
    why_not: Callable[[fx.Node], str | None]
    lower: Callable[[fx.GraphModule, fx.Node], fx.Node]
    targets: tuple[Any, ...]
    absorb: Callable[[fx.GraphModule], int]
    finish: Callable[[fx.GraphModule], Callable[..., Any]]
    channels_last: Callable[[], tuple[Any, ...]] = tuple
    reads_parts: tuple[Any, ...] = ()
    merges_activations: bool = False
    weight_bits: Callable[[], int] = lambda: 8

    def scheme(self, static: bool) -> str:
        """The scheme where none is asked for; static: there is calibration."""
        return f"w{self.weight_bits()}a8" + ("" if static else "-dynamic")


def backend_named(name: str, device: torch.device) -> Backend:
    """The backend of a name, checked to run on this machine and this device; `auto` picks the first that does."""
    from qpass.backends import cpu, reference, triton

    table = {b.name: b for b in (cpu.BACKEND, reference.BACKEND, triton.BACKEND)}
    if name == "auto":
        first = {"cpu": cpu.BACKEND, "cuda": triton.BACKEND}.get(device.type, reference.BACKEND)
        return first if first.unavailable() is None else reference.BACKEND
    if name not in table:
        raise QpassError(f"backend {name!r} is not one of auto, {', '.join(table)}.{nearest(name, table)}")
    why = table[name].unavailable()
    if why is None and name == "cpu" and device.type != "cpu":
        why = f"the model is on {device.type}; move it with .to('cpu') or use backend='auto'"
    if why is None and name == "triton" and device.type not in ("cuda", "cpu"):
        why = f"the model is on {device.type}; its kernels run on cuda, their references on cpu"
    if why:
        raise QpassError(f"backend {name!r} cannot run here: {why}.")
    return table[name]
