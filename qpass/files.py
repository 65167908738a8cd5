"""Files that are written whole or not at all, whoever else writes them at the same time."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and moves it there at the end; on any error the old file stays.

    A full disk, an interrupt or a second writer leaves the old file or a whole new one, and no `.part` file.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    try:
        with open(part, "xb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # what the user's umask gives a new file
        yield part
        os.chmod(part, mode)
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)
