"""Large tensors go through `arithmetic` as one kernel, made by torch.compile: C++ on CPU, Triton on GPU.

Small ones, and all where no compiler is there, go through it operation by operation; a warning tells of a missing compiler.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 16  # elements from which on a kernel of its own pays
UNFUSED = (
    "fake quantization runs operation by operation, several times slower: torch.compile could not make its kernels ({}); "
    "a C++ compiler (g++) has to be on the path"
)
_BROKEN: list[str] = []


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, dynamic=True)


def fused(function: Callable[..., Any], x: Tensor, *args: Any) -> Any:
    """`function(x, *args)`."""
    if x.numel() < LARGE or _BROKEN or torch.compiler.is_compiling() or x.dtype == torch.float64:
        return function(x, *args)
    try:
        with torch._dynamo.config.patch(recompile_limit=64, accumulated_recompile_limit=1024):
            return _compiled(function)(x, *args)
    except (torch._dynamo.exc.TorchDynamoException, OSError) as error:
        _BROKEN.append(type(error).__name__)
        warnings.warn(UNFUSED.format((str(error).splitlines() or [""])[0]), stacklevel=2)
        return function(x, *args)
