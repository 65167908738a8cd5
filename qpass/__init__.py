"""qpass: a quantizing compiler for PyTorch. One call takes a float model and gives back the same object, in integers.

q = qpass.compile(model, scheme="w8a8", example_inputs=batch, calibration=batches)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qpass import conv_ops as conv_ops
from qpass import ops as ops  # both register torch.ops.qpass
from qpass.api import analyze, compile
from qpass.backend_entry import qpass_backend
from qpass.errors import QpassError
from qpass.inspect import inspect
from qpass.interchange.compressed import save_pretrained
from qpass.interchange.export import export
from qpass.legacy import quantize_dynamic
from qpass.persist import load, save
from qpass.plan import Decision, Plan
from qpass.schemes import Recipe, Scheme

if TYPE_CHECKING:
    from qpass import qat
    from qpass.prepare import prepare_qat

__version__ = "0.1.0"
__all__ = [
    "Decision",
    "Plan",
    "QpassError",
    "Recipe",
    "Scheme",
    "analyze",
    "compile",
    "export",
    "inspect",
    "load",
    "ops",
    "prepare_qat",
    "qat",
    "qpass_backend",
    "quantize_dynamic",
    "save",
    "save_pretrained",
]


def __getattr__(name: str) -> Any:
    """What only a training needs is loaded when it is asked for."""
    if name == "qat":
        return importlib.import_module("qpass.qat")
    if name == "prepare_qat":
        return importlib.import_module("qpass.prepare").prepare_qat
    raise AttributeError(f"module 'qpass' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
