"""Launching: whether a kernel can run on these tensors, which chip it is, and the scratch memory of sums that are split."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

OPTIONS = {"enable_fp_fusion": True}  # of every launch: products are added without a rounding between


@dataclass(frozen=True)
class Chip:
    """What a choice of tiles depends on. shared: bytes a program may have; processors: streaming multiprocessors."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared: int


INTERPRETER = Chip("interpreter", (9, 0), 4, 232448)


@functools.cache
def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 when this package was imported)."""
    from qpass_kernels import blocks

    return not isinstance(blocks.codes, triton.runtime.JITFunction)


def cdiv(a: int, b: int) -> int:
    """A / b, rounded up. triton's own takes some microseconds outside of a kernel."""
    return -(-a // b)


def chip_of(device: torch.device) -> Chip:
    """The chip behind a device; the interpreter's stands for an H100."""
    if device.type != "cuda":
        return INTERPRETER
    return _chip(torch.cuda.current_device() if device.index is None else device.index)


@functools.cache
def _chip(index: int) -> Chip:
    found = torch.cuda.get_device_properties(index)
    shared = getattr(found, "shared_memory_per_block_optin", 166912)
    return Chip(found.name, (found.major, found.minor), found.multi_processor_count, shared)


def check_device(op: str, x: Tensor) -> None:
    """Raises ValueError where no kernel can run on a tensor's device."""
    if x.device.type != "cuda" and not (x.device.type == "cpu" and interpreting()):
        raise ValueError(
            f"{op}: its kernel runs on CUDA devices, or interpreted with TRITON_INTERPRET=1; x is on {x.device}"
        )


SLOTS, SLOT = 64, 4096  # streams of a device with counters of their own, and how many each has
_counters: dict[torch.device, Tensor] = {}
_slots: dict[tuple[torch.device, int], int] = {}


def reserve(device: torch.device) -> None:
    """Makes the counters of a device. Called before a CUDA graph is recorded, they lie outside of its memory."""
    if device not in _counters and not _capturing(device):
        _counters[device] = torch.zeros(SLOTS, SLOT, dtype=torch.int32, device=device)
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams count with them too


def scratch(x: Tensor, tiles: int, split: int, size: int, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """(partial sums, counters at 0) of `tiles` tiles of `size` sums in `split` slices; (None, None) where split is 1.

    Kernels leave the counters at 0. They belong to a device and a stream: two CUDA graphs that were captured on one stream
    must not be replayed at the same time. Where none are left, or a graph is captured before there are any, a launch
    zeroes its own.
    """
    if split == 1:
        return None, None
    return torch.empty(tiles * split * size, dtype=dtype, device=x.device), _counted(x.device, tiles)


def _counted(device: torch.device, tiles: int) -> Tensor:
    reserve(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    slot = _slots.setdefault((device, stream), sum(1 for known, _ in _slots if known == device))
    if device not in _counters or slot >= SLOTS or tiles > SLOT:
        return torch.zeros(tiles, dtype=torch.int32, device=device)
    return _counters[device][slot]


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
