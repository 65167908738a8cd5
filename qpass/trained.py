"""The mark of a model in training: what it was prepared for. Who compiles looks here, and loads qpass.qat where it is set."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from qpass.plan import Plan

RECORD = "qpass_training"  # the attribute of a prepared model that says what it was prepared for


@dataclass
class Training:
    """plan: without codes and steps, which the model holds. method: the name of the subgradients."""

    plan: Plan
    method: str


def training_of(model: nn.Module) -> Training | None:
    """What a model was prepared for, or None."""
    return vars(model).get(RECORD)
