"""Whether a module multiplies its weight by its own first argument, which is what training fake-quantizes.

Torch's linears and convolutions do. A module with a forward of its own may normalize first, or hold one matrix among much
else: it is called, and every operation on its weight is looked at. A view of the argument is the argument.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from qpass.convolutions import MODULES
from qpass.qat.sites import CONVOLUTIONS

KNOWN = {kind.forward for kind in (nn.Linear, nn.Embedding, nn.MultiheadAttention, *CONVOLUTIONS, *MODULES)}


class _Watch(TorchFunctionMode):
    """Sees every operation in the calls of some modules. candidates: module -> the name of its weight."""

    def __init__(self, candidates: dict[nn.Module, str]) -> None:
        super().__init__()
        self.candidates = candidates
        self.arguments: dict[nn.Module, set[int]] = {}  # of the calls that run
        self.did: set[nn.Module] = set()
        self.did_not: set[nn.Module] = set()

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a call."""
        first = next(iter((*args, *kwargs.values())), None)
        self.arguments[module] = {_memory(first)} if isinstance(first, Tensor) else set()

    def end(self, module: nn.Module, *_: Any) -> None:
        """After it."""
        self.arguments.pop(module, None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        leaves = pytree.tree_leaves((args, kwargs or {}))
        found = {_memory(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()}
        for module, argument in self.arguments.items():
            own = {_memory(p) for p in module.parameters(recurse=False)}
            if _memory(getattr(module, self.candidates[module])) in found and found - own:
                (self.did if found - own <= argument else self.did_not).add(module)
        return func(*args, **(kwargs or {}))


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def with_other_operands(candidates: dict[nn.Module, str], calls: Iterable[Callable[[], Any]]) -> set[nn.Module]:
    """Those of the modules (and the names of their weights) that were not seen to multiply it by their first argument."""
    asked = {module: name for module, name in candidates.items() if type(module).forward not in KNOWN}
    if not asked:
        return set()
    watch = _Watch(asked)
    hooks = [m.register_forward_pre_hook(watch.begin, with_kwargs=True) for m in asked]
    hooks += [m.register_forward_hook(watch.end, always_call=True) for m in asked]
    try:
        with torch.no_grad(), watch:
            for call in calls:
                call()
    finally:
        for hook in hooks:
            hook.remove()
    return set(asked) - (watch.did - watch.did_not)
