"""Fake quantization on or off, for all of a model."""

from __future__ import annotations

from torch import nn

from qpass.errors import QpassError
from qpass.qat.sites import quantizers


def switch(model: nn.Module, on: bool) -> None:
    """Every quantizer of a prepared model gives values back rounded (on) or as they are (off).

    Off, the model computes and trains as the float model of its weights does, to the last bit; steps get no gradients
    (which DistributedDataParallel wants to be told: find_unused_parameters=True).
    """
    found = quantizers(model)
    if not found:
        raise QpassError(
            f"this {type(model).__name__} has no quantizer to switch; make it a model in training with qpass.prepare_qat."
        )
    for quantizer in found:
        quantizer.on = on
