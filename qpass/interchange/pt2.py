"""A compiled model as a `.pt2` file: an exported program whose weights are integers and whose ops are qpass's and ATen's.

    torch.export.load("m.pt2").module()(*inputs)        with torch and qpass imported, on any machine; any device's reference
    torch.compile(..., backend="qpass")                 the same program, lowered to the machine it is on

The graph is the one at level qdq (see program.py), so no file depends on the processor that wrote it.
"""

from __future__ import annotations

import os

import torch

from qpass.errors import QpassError
from qpass.files import replacing


def write_pt2(program: torch.export.ExportedProgram, path: str | os.PathLike[str]) -> None:
    """Writes a program, whole or not at all; without the example inputs, which are the user's data."""
    program._example_inputs = None
    try:
        with replacing(path) as part, open(part, "wb") as file:
            torch.export.save(program, file)
    except OSError as error:
        raise QpassError(f"cannot write {path}: {error}; free some space or choose another folder.") from error
