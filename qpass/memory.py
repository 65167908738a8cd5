"""What the C library keeps of freed memory, given back to the system."""

from __future__ import annotations

import ctypes
import sys


def give_back() -> None:
    """Returns what was freed, such as the float weights of a model that was packed in place, on Linux with glibc.

    Tensors of some megabytes lie in the heap there, and a hole in the heap stays with the process until it is asked for.
    """
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)
