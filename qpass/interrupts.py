"""An interrupt (Ctrl-C) that got lost on its way is raised again.

Python's handler raises KeyboardInterrupt in whatever code runs at that moment. In a finalizer, a callback of the garbage
collector or of a weak reference, the exception is printed and dropped; torch's guards clear it. A program that calibrates
for an hour would then go on as if nobody had asked it to stop. So a long run remembers the signal, too.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_came = threading.Event()


@contextmanager
def heard() -> Iterator[None]:
    """While it lasts, `stop_if_asked`, and its end, raise an interrupt that came and was lost.

    Only in the main thread and beside Python's own handler of SIGINT, which is back afterwards: a program's own stays.
    """
    if threading.current_thread() is not threading.main_thread() or not _default():
        yield
        return
    _came.clear()
    signal.signal(signal.SIGINT, _remember)
    try:
        yield
        stop_if_asked()
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        _came.clear()


def stop_if_asked() -> None:
    """Raises KeyboardInterrupt if one came within `heard` and did not arrive. Called between the steps of a long run."""
    if _came.is_set() and threading.current_thread() is threading.main_thread():
        _came.clear()
        raise KeyboardInterrupt


def _default() -> bool:
    return signal.getsignal(signal.SIGINT) is signal.default_int_handler


def _remember(number: int, frame: FrameType | None) -> None:
    _came.set()
    signal.default_int_handler(number, frame)
