"""qpass: a quantizing compiler for PyTorch. One call takes a float model and gives back the same object, in integers.

q = qpass.compile(model, scheme="w8a8", example_inputs=batch, calibration=batches)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qpass import conv_ops as conv_ops
from qpass import nested_ops as nested_ops
from qpass import ops as ops  # these register torch.ops.qpass
from qpass.errors import QpassError
from qpass.inspect import inspect  # here, not below: its package has the same name
from qpass.search import search  # the same

if TYPE_CHECKING:
    from qpass import qat
    from qpass.api import compile
    from qpass.backend_entry import qpass_backend
    from qpass.bits import at_bits, bits_of, set_bits
    from qpass.interchange.compressed import save_pretrained
    from qpass.interchange.export import export
    from qpass.legacy import quantize_dynamic
    from qpass.persist import load, save
    from qpass.plan import Decision, Plan
    from qpass.planning import analyze
    from qpass.prepare import prepare_qat
    from qpass.schemes import Recipe, Scheme
    from qpass.serving.recalibrate import recalibrate
    from qpass.serving.start import monitor

# name -> the module that has it, loaded when the name is first asked for
WHERE = {
    "Decision": "qpass.plan",
    "Plan": "qpass.plan",
    "Recipe": "qpass.schemes",
    "Scheme": "qpass.schemes",
    "analyze": "qpass.planning",
    "at_bits": "qpass.bits",
    "bits_of": "qpass.bits",
    "compile": "qpass.api",
    "export": "qpass.interchange.export",
    "load": "qpass.persist",
    "monitor": "qpass.serving.start",
    "prepare_qat": "qpass.prepare",
    "qpass_backend": "qpass.backend_entry",
    "quantize_dynamic": "qpass.legacy",
    "recalibrate": "qpass.serving.recalibrate",
    "save": "qpass.persist",
    "save_pretrained": "qpass.interchange.compressed",
    "set_bits": "qpass.bits",
}

__version__ = "0.1.0"
__all__ = [
    "Decision",
    "Plan",
    "QpassError",
    "Recipe",
    "Scheme",
    "analyze",
    "at_bits",
    "bits_of",
    "compile",
    "export",
    "inspect",
    "load",
    "monitor",
    "ops",
    "prepare_qat",
    "qat",
    "qpass_backend",
    "quantize_dynamic",
    "recalibrate",
    "save",
    "save_pretrained",
    "search",
    "set_bits",
]


def __getattr__(name: str) -> Any:
    if name == "qat":
        return importlib.import_module("qpass.qat")
    if name not in WHERE:
        raise AttributeError(f"module 'qpass' has no attribute {name!r}")
    found = getattr(importlib.import_module(WHERE[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
