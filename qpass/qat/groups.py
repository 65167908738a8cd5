"""Parameter groups for an optimizer: steps, clips and offsets have a learning rate and a weight decay of their own."""

from __future__ import annotations

from typing import Any

from torch import nn

from qpass.qat.sites import quantizers


def param_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    step_lr: float | None = None,
    step_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups for an optimizer: matrices (decayed), vectors (not decayed), steps, clips and offsets.

    lr: of weights. step_lr: of steps, which are trained as logarithms, so that it is relative to them (lr unless given).
    step_decay: weight decay of steps, which pulls them to 1; PACT's regularization.
    """
    own = {id(p) for quantizer in quantizers(model) for p in quantizer.parameters()}
    free = [p for p in model.parameters() if p.requires_grad]
    groups = (
        ([p for p in free if id(p) not in own and p.dim() > 1], lr, weight_decay),
        ([p for p in free if id(p) not in own and p.dim() < 2], lr, 0.0),
        ([p for p in free if id(p) in own], lr if step_lr is None else step_lr, step_decay),
    )
    return [{"params": params, "lr": rate, "weight_decay": decay} for params, rate, decay in groups if params]
