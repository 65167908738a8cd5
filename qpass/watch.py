"""What a compiled model was compiled from, and whether it still is that: replaced layers and weights, writes to weights.

The front end's own guards would tell, at the price of thousands of them a call. Here a slot is one look into a dictionary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

SIMPLE = (bool, int, float, str, type(None))
OURS = ("_compiled_call_impl", "__deepcopy__")  # what qpass itself hangs in a compiled model
UNREAD = ("num_batches_tracked", "_is_full_backward_hook", "_is_hf_initialized")  # inference does not read them
VERSION = operator.attrgetter("_version")


@dataclass
class Slots:
    """Places in modules: the dictionary (parameters, buffers, submodules, attributes), the name, and what was there."""

    holders: list[dict[str, Any]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)

    def add(self, holder: dict[str, Any], names: Iterable[str]) -> None:
        """Takes down what a dictionary holds under some names."""
        for name in names:
            self.holders.append(holder)
            self.names.append(name)
            self.values.append(holder[name])


@dataclass
class Watch:
    """fixed: parameters and submodules. moving: buffers, numbers, flags and names, which a model may change as it runs.
    folded: weights that have become constants of a graph; versions: what was folded. tensors: all of them; pointers: where
    their values lie (`.half()` leaves the parameter and moves its values).
    """

    fixed: Slots = field(default_factory=Slots)
    moving: Slots = field(default_factory=Slots)
    folded: list[Tensor] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    tensors: list[Tensor] = field(default_factory=list)
    pointers: list[int] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> Watch:
        """Everything that hangs in a model now."""
        watch = Watch()
        for module in model.modules():
            watch.fixed.add(module._parameters, module._parameters)
            watch.fixed.add(module._modules, module._modules)
            watch.moving.add(module._buffers, [name for name in module._buffers if name not in UNREAD])
            watch.moving.add(vars(module), _flags(module))
        watch.tensors = [*model.parameters(), *model.buffers()]
        watch.pointers = [tensor.data_ptr() for tensor in watch.tensors]
        return watch

    def fold(self, tensor: Tensor) -> None:
        """Notes that a graph holds what is in a tensor now."""
        if not any(tensor is known for known in self.folded):
            self.folded.append(tensor)
            self.versions.append(tensor._version)

    def changed(self) -> bool:
        """Whether a layer or weight was replaced, or given other memory, or a folded weight written to."""
        return (
            _differ(self.fixed)
            or any(map(operator.ne, map(VERSION, self.folded), self.versions))
            or any(map(operator.ne, map(Tensor.data_ptr, self.tensors), self.pointers))
        )

    def moved(self) -> bool:
        """Whether the model changes buffers, numbers or flags of its own, or somebody has."""
        return _differ(self.moving)


def _flags(module: nn.Module) -> list[str]:
    """The attributes that a module may change as it runs; of torch's own modules `training`, where their forward reads it."""
    kind = type(module)
    if kind.__module__.startswith(("torch.nn.", "qpass.")):
        return ["training"] if "training" in getattr(getattr(kind.forward, "__code__", None), "co_names", ()) else []
    return [n for n, v in vars(module).items() if isinstance(v, SIMPLE) and n not in (*OURS, *UNREAD)]


def _differ(slots: Slots) -> bool:
    """Whether any slot holds another object; thousands are looked at on every call, so no Python runs for each."""
    return not all(map(operator.is_, map(dict.get, slots.holders, slots.names), slots.values))
