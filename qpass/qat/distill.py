"""Distillation: the model in training is to answer as the float model does, and to come to its answer the same way.

    L   = T^2 / rows  sum over rows of  KL( softmax(teacher / T) || softmax(student / T) )
    L_f = mean over modules of  |s_m - t_m|^2 / |t_m|^2

L: Hinton et al. 2015, 1503.02531, section 2; a row is one set of logits: an image, or one token of a sequence. L_f: what m
gives in the student and in the teacher (FitNets, Romero et al. 2015, 1412.6550, equation 3, of modules of one size; hidden
states in TernaryBERT, Zhang et al. 2020, 2009.12812), each relative to its own power, so that deep ones count as much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.calibrate import evaluating
from qpass.errors import QpassError
from qpass.plan import matches

NO_FEATURES = (
    "distillation: no module of this {} matches {}; name those whose outputs are to be alike by globs of their paths, such "
    "as features='layers.*', or use qpass.qat.distillation_loss, which compares logits alone."
)


def distillation_loss(
    student: Any, teacher: nn.Module | Tensor, *args: Any, temperature: float = 1.0, **kwargs: Any
) -> Tensor:
    """The loss, a scalar: `loss = qpass.qat.distillation_loss(t(x), model, x)`.

    student: logits [..., classes], or an output that has `logits`. teacher: the float model, called on args and kwargs
    without gradients in eval mode, or its logits.
    """
    wanted = teacher if isinstance(teacher, Tensor) else _answers(teacher, args, kwargs)
    mine, theirs = _logits(student, "student"), _logits(wanted, "teacher")
    if mine.shape != theirs.shape:
        raise QpassError(
            f"distillation: the student gives logits {tuple(mine.shape)}, the teacher {tuple(theirs.shape)}; both have to "
            "answer the same batch."
        )
    rows = max(mine[..., 0].numel(), 1)
    log_p, log_q = ((t.float() / temperature).log_softmax(-1).flatten(0, -2) for t in (mine, theirs))
    return F.kl_div(log_p, log_q, reduction="sum", log_target=True) * temperature**2 / rows


def _answers(teacher: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with evaluating(teacher), torch.no_grad():
        return teacher(*args, **kwargs)


def _logits(output: Any, whose: str) -> Tensor:
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(found, Tensor) or found.dim() < 1:
        raise QpassError(
            f"distillation: the {whose}'s output, a {type(output).__name__}, is no tensor and has no logits."
        )
    return found if found.dim() > 1 else found[None]


class Distillation:
    """L + weight L_f of each batch: `loss = distillation(t(x), x)`, of the answers t has just given and of its modules.

    features: globs of module paths; unless given, the members of every outermost list of modules of one class (a model's
    layers). The teacher has modules of the same paths, and is called without gradients in eval mode. `close` removes hooks.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        features: str | Iterable[str] | None = None,
        weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        inner = student.module if isinstance(student, nn.parallel.DistributedDataParallel) else student
        self.teacher, self.weight, self.temperature = teacher, weight, temperature
        self.paths = _paths(inner, features)
        theirs = dict(teacher.named_modules())
        lost = [path for path in self.paths if path not in theirs]
        if lost:
            raise QpassError(f"distillation: the teacher, a {type(teacher).__name__}, has no module {lost[0]!r}.")
        self.modules = [theirs[path] for path in self.paths]
        self.given: dict[str, Tensor] = {}
        mine = dict(inner.named_modules())
        self.hooks = [mine[path].register_forward_hook(_Keep(self.given, path)) for path in self.paths]

    def __call__(self, output: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss, a scalar. output: the student's on args and kwargs, logits or an object that has them."""
        wanted: dict[str, Tensor] = {}
        pairs = zip(self.paths, self.modules, strict=True)
        hooks = [module.register_forward_hook(_Keep(wanted, path, False)) for path, module in pairs]
        try:
            loss = distillation_loss(output, self.teacher, *args, temperature=self.temperature, **kwargs)
            terms = [_apart(path, self.given.get(path), wanted.get(path)) for path in self.paths]
        finally:
            self.given.clear()
            for hook in hooks:
                hook.remove()
        return loss + self.weight * torch.stack(terms).mean()

    def close(self) -> None:
        """Removes the hooks."""
        for hook in self.hooks:
            hook.remove()


def _paths(model: nn.Module, features: str | Iterable[str] | None) -> list[str]:
    if features is None:
        alike: list[str] = []
        for path, module in model.named_modules():
            inside = any(path.startswith(f"{layer}.") for layer in alike)  # such as the experts of a layer
            if isinstance(module, nn.ModuleList) and not inside and len({type(m) for m in module}) == 1:
                alike += [f"{path}.{i}" for i in range(len(module))]
        return alike or _none(model, "a list of modules of one class")
    globs = [features] if isinstance(features, str) else list(features)
    found = [path for path, _ in model.named_modules() if any(matches(path, glob) for glob in globs)]
    return found or _none(model, ", ".join(map(repr, globs)))


def _none(model: nn.Module, what: str) -> list[str]:
    raise QpassError(NO_FEATURES.format(type(model).__name__, what))


class _Keep:
    """A hook that keeps what a module gives. learns: where gradients are wanted alone, not when it is compiled or scored."""

    def __init__(self, found: dict[str, Tensor] | None, path: str = "", learns: bool = True) -> None:
        self.found, self.path, self.learns = found, path, learns

    def __call__(self, module: nn.Module, args: Any, output: Any) -> None:
        if self.found is None or (self.learns and not torch.is_grad_enabled()):
            return
        if torch._C._current_graph_task_id() == -1:  # else checkpointing computes it again
            values = output.values() if isinstance(output, Mapping) else output
            first = next(iter(values), None) if isinstance(values, Iterable) else None
            if isinstance(output, Tensor) or isinstance(first, Tensor):
                self.found[self.path] = output if isinstance(output, Tensor) else first

    def __reduce__(self) -> tuple[Any, ...]:
        return _Keep, (None,)  # a copy of the model belongs to no distillation


def _apart(path: str, mine: Tensor | None, theirs: Tensor | None) -> Tensor:
    if mine is None or theirs is None or mine.shape != theirs.shape:
        shapes = [None if t is None else tuple(t.shape) for t in (mine, theirs)]
        raise QpassError(
            f"distillation: {path} gives {shapes[0]} in the student and {shapes[1]} in the teacher (None: no tensor in this "
            "call); call the student on the same batch right before, and name modules that are called in both."
        )
    wanted = theirs.float()
    return (mine.float() - wanted).square().mean() / wanted.square().mean().clamp(min=torch.finfo(torch.float32).tiny)
