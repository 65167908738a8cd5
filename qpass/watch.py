"""What a compiled model was compiled from, and whether it still is that: replaced layers and weights, writes to weights.

The front end's own guards would tell, at the price of thousands of them a call. Here a slot is one look into a dictionary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

Slot = tuple[dict[str, Any], str, Any]  # of a module: its parameters, buffers or submodules; the name; what was there


SIMPLE = (bool, int, float, str, type(None))
OURS = ("_compiled_call_impl", "__deepcopy__")  # what qpass itself hangs in a compiled model


@dataclass
class Watch:
    """fixed: parameters and submodules. moving: buffers, numbers, flags and names, which a model may change as it runs.
    folded: weights that have become constants of a graph, with the version that was folded.
    """

    fixed: list[Slot]
    moving: list[Slot]
    folded: list[tuple[Tensor, int]] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module) -> Watch:
        """Everything that hangs in a model now."""
        fixed, moving = [], []
        for module in model.modules():
            for kind, into in ((module._parameters, fixed), (module._modules, fixed), (module._buffers, moving)):
                into += [(kind, name, value) for name, value in kind.items() if value is not None]
            own = vars(module)
            known = type(module).__module__.startswith("torch.nn.")  # its sizes stay what they are
            names = ("training",) if known else [n for n, v in own.items() if isinstance(v, SIMPLE) and n not in OURS]
            moving += [(own, name, own[name]) for name in names]
        return Watch(fixed, moving)

    def fold(self, tensor: Tensor) -> None:
        """Notes that a graph holds what is in a tensor now."""
        self.folded.append((tensor, tensor._version))

    def changed(self) -> bool:
        """Whether a layer or weight was replaced, or a folded weight written to."""
        return any(kind.get(name) is not value for kind, name, value in self.fixed) or any(
            tensor._version != version for tensor, version in self.folded
        )

    def moved(self) -> bool:
        """Whether the model changes buffers, numbers or flags of its own, or somebody has."""
        return any(kind.get(name) is not value for kind, name, value in self.moving)
