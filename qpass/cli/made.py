"""What several commands make of a target: the quantized model, a call of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import qpass
from qpass.backends import backend_named
from qpass.calibrate import call_arguments
from qpass.checks import device_of
from qpass.cli.targets import Target


def quantized(target: Target, scheme: str | None, backend: str, **more: Any) -> nn.Module:
    """The target compiled; without a scheme static where it brings calibration, else dynamic."""
    if scheme is None:
        scheme = backend_named(backend, device_of(target.model)).scheme(target.calibration is not None)
    return qpass.compile(target.model, scheme, target.batch, target.calibration, backend=backend, **more)


def called(function: Callable[..., Any], batch: Any) -> Callable[[], Any]:
    """A call of a model on a batch, without gradients, that takes nothing."""
    args, kwargs = call_arguments(batch, "example_inputs")

    def call() -> Any:
        with torch.no_grad():
            return function(*args, **kwargs)

    return call
