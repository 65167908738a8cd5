"""qpass: a quantizing compiler for PyTorch. One call takes a float model and gives back the same object, in integers.

q = qpass.compile(model, scheme="w8a8", example_inputs=batch, calibration=batches)
"""

from qpass import conv_ops as conv_ops
from qpass import ops as ops  # both register torch.ops.qpass
from qpass import qat
from qpass.api import analyze, compile
from qpass.backend_entry import qpass_backend
from qpass.errors import QpassError
from qpass.inspect import inspect
from qpass.interchange.compressed import save_pretrained
from qpass.interchange.export import export
from qpass.legacy import quantize_dynamic
from qpass.persist import load, save
from qpass.plan import Decision, Plan
from qpass.prepare import prepare_qat
from qpass.schemes import Recipe, Scheme

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
