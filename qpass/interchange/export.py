"""`qpass.export`: a compiled model as one file for another program, by the file's suffix.

m.pt2     torch.export's own format: every scheme; read with torch and qpass          (pt2.py)
m.onnx    ONNX with QDQ nodes: static 8-bit inputs, or weights alone; read with onnxruntime and others  (onnx_qdq.py)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from qpass.calibrate import Batch
from qpass.checks import check_one_width
from qpass.errors import QpassError, nearest
from qpass.interchange.program import compiled_by_qpass, qdq_program
from qpass.interchange.pt2 import write_pt2

SUFFIXES = (".pt2", ".onnx")


def export(model: nn.Module, example_inputs: Batch, path: str | os.PathLike[str], dynamic_shapes: Any = None) -> None:
    """Writes the call of a compiled model into a file, by its suffix: `.pt2` or `.onnx`; whole, or not at all.

    example_inputs: as in `compile`; the file takes inputs like them. dynamic_shapes: the sizes that may vary, as torch.export
    takes them, such as `{"x": {0: torch.export.Dim("batch")}}`; without it, every size is that of the example.

    Nested weights are written whole, and are read at the bits that the model is set to now.

    A transformers output class comes back as a dictionary. Raises QpassError for a model that qpass did not compile or that
    was changed since, inputs that do not fit, a call that torch.export cannot capture, what ONNX cannot express (the site is
    named), and a file that cannot be written.
    """
    target = _checked(path)
    runtime = compiled_by_qpass(model)
    if target.suffix == ".onnx":
        from qpass.interchange.onnx_qdq import check_installed, export_onnx  # only who writes ONNX waits for it

        check_installed()
        check_one_width(runtime.plan, "ONNX has no weights that are read at several widths")
        export_onnx(model, example_inputs, target, dynamic_shapes, runtime.plan)
    else:
        write_pt2(qdq_program(model, example_inputs, dynamic_shapes, runtime.plan), target)


def _checked(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    if target.is_dir():
        raise QpassError(f"{target} is a directory; name a file in it, such as {target / 'model.pt2'}.")
    if target.suffix not in SUFFIXES:
        hint = nearest(target.suffix, SUFFIXES) if target.suffix else ""
        raise QpassError(
            f"{target} ends in {target.suffix!r}; qpass.export writes {' or '.join(SUFFIXES)} files.{hint}"
        )
    if not target.parent.is_dir():
        raise QpassError(f"cannot write {target}: there is no directory {target.parent}; make it first.")
    return target
