"""How a compiled model is called, and its parts: through the front end, which captures each kind of call the first time.

    q(x)                          the model's compiled call
    q.encoder(x), inside q(x)     what any module does: it is part of the graph
    q.encoder(x), by itself       a compiled call of its own, captured the first time that it comes

`generate()` calls an encoder past the model; users call a backbone, or one tower of two. Parts are children of the model, and
what `get_encoder` and `get_decoder` of transformers return, where they hold several packed weights. They have the runtime of
the model: its plan, its monitor, its watch.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qpass.capture import front_end
from qpass.install import packed_weights
from qpass.self_watched import CHANGED
from qpass.watch import Watch

CALL = "_compiled_call_impl"  # what torch calls in a module's stead
GETTERS = ("get_encoder", "get_decoder")
TRAINING = (
    "this model was compiled for inference and is in training mode: dropout is active and no gradient is computed; "
    "call .eval(), or train the float model"
)


class _Inside(threading.local):
    """Whether this thread is in a call of a compiled model."""

    now: bool = False


_INSIDE = _Inside()


@dataclass(eq=False)
class Call:
    """The compiled call of a model, or of the part of it at `path`. runtime: a Runtime; the front end's backend.

    It warns the first time that the model is in training mode, or is not what it was.
    """

    model: nn.Module
    runtime: Any
    watch: Watch
    path: str = ""
    warned: list[str] = field(default_factory=list)
    captured: list[Callable[..., Any]] = field(
        default_factory=list
    )  # front ends: frozen, then one that guards what moves

    def __post_init__(self) -> None:
        """Finds the module that is called."""
        self.module = self.model.get_submodule(self.path)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied module has no compiled call until it is given one; those with parametrized weights copy all they hold."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the module gives; where it is a part and the model itself is at work, as any module does."""
        if self.path and (_INSIDE.now or torch.compiler.is_compiling() or self.model.__dict__.get(CALL) is None):
            return self.module._call_impl(*args, **kwargs)
        before, _INSIDE.now = _INSIDE.now, True
        try:
            return self._called(args, kwargs)
        finally:
            _INSIDE.now = before

    def _called(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.model.training:
            self._warn(TRAINING)
        if self.watch.changed():
            self._warn(CHANGED)
            with torch.no_grad():
                return self.module._call_impl(*args, **kwargs)
        if self._wanting():
            with self.runtime.lock:
                if self._wanting():  # no other thread was first
                    frozen = not self.captured
                    self.captured.append(front_end(self.model, self.runtime, frozen=frozen, path=self.path))
        if self.runtime.monitor is not None:
            return self.runtime.monitor(self.captured[-1], args, kwargs, self.module)
        return self.captured[-1](*args, **kwargs)

    def _wanting(self) -> bool:
        """Whether a front end is to be made: the first; a second where the model changes what the first has frozen."""
        return not self.captured or (len(self.captured) == 1 and self.watch.moved())

    def _warn(self, sentence: str) -> None:
        if sentence not in self.warned:
            self.warned.append(sentence)
            warnings.warn(sentence, stacklevel=5)


def parts_of(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the parts of a model that are worth a compiled call of their own."""
    paths = {module: path for path, module in model.named_modules()}
    found = dict.fromkeys(model.children())
    for name in GETTERS:
        try:
            found[getattr(model, name)()] = None
        except Exception:  # a model has none, or one of another meaning
            continue
    for module in found:
        own = type(getattr(module, "forward", None)).__name__ == "method" and not isinstance(module, nn.ModuleList)
        if own and module is not model and module in paths and len(packed_weights(module)) > 1:
            yield paths[module], module


def installed(model: nn.Module, runtime: Any, watch: Watch) -> None:
    """Gives a model, and its parts, their compiled calls."""
    # between the graphs of a broken one the front end looks at each frame, and this one is none of the model's
    torch._dynamo.eval_frame.skip_code(Call.__call__.__code__)
    setattr(model, CALL, Call(model, runtime, watch))
    for path, module in parts_of(model):
        setattr(module, CALL, Call(model, runtime, watch, path))


def removed(model: nn.Module) -> None:
    """Takes them away again, and no other compiled call: a part may have one of its owner's."""
    for module in model.modules():
        if isinstance(vars(module).get(CALL), Call):
            del vars(module)[CALL]
