"""The kernels' package, imported when a model first needs it: the only file of qpass that imports qpass_kernels."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import torch

OLDEST = (8, 0)  # of compute capability: 16-bit floats in tensor cores, asynchronous copies
FLOAT8 = (8, 9)


@functools.cache
def kernels() -> ModuleType:
    """qpass_kernels.ops, which registers the ops and has the packing of weights."""
    import qpass_kernels.ops

    return qpass_kernels.ops


@functools.cache
def unavailable() -> str | None:
    """None where the kernels can be imported, or why not."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install 'qpass-torch[triton]'"
    try:
        kernels()
    except Exception as error:  # a triton of another shape
        return f"qpass_kernels cannot be imported: {type(error).__name__}: {error}"
    return None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; on CPU, where ops run their reference, the newest there is."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (99, 0)


def too_old(device: torch.device, float8: bool = False) -> str | None:
    """None where a device runs the kernels, or why not."""
    have, need = capability(device), FLOAT8 if float8 else OLDEST
    if have >= need:
        return None
    kind = "float8" if float8 else "quantized"
    return f"this GPU has compute capability {have[0]}.{have[1]}; {kind} kernels need {need[0]}.{need[1]}"
