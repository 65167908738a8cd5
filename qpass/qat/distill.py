"""Distillation: the model in training is to answer as the float model does, not only to name the right class.

    L = T^2 / rows  sum over rows of  KL( softmax(teacher / T) || softmax(student / T) )

(Hinton et al. 2015, 1503.02531, section 2.) A row is one set of logits: an image, or one token of a sequence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.calibrate import evaluating
from qpass.errors import QpassError


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
