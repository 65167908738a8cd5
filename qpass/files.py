"""Files that are written whole or not at all, whoever else writes them at the same time: one, or many in a directory."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a name beside `path` to write to, and moves it there at the end; on any error the old file stays.

    A full disk, an interrupt or a second writer leaves the old file or a whole new one, and no `.part` file.
    """
    target = Path(os.path.realpath(path))
    part = _beside(target)
    try:
        mode = _create(part)
        yield part
        _finish(part, mode)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def filling(directory: str | os.PathLike[str], obsolete: Callable[[str], bool]) -> Iterator[Callable[[str], Path]]:
    """Gives a function from a file's name to where it is to be written; at the end all are moved into the directory.

    On any error the directory is as it was. Other files in it stay, but for those whose names are `obsolete` and were not
    written. Moves are made in the order of writing, under a lock that `locked` waits for, so two writers end with the files
    of one of them.
    """
    target = Path(os.path.realpath(directory))
    made = not target.exists()
    target.mkdir(exist_ok=True)
    parts: dict[str, tuple[Path, int]] = {}

    def stage(name: str) -> Path:
        part = _beside(target / name)
        parts[name] = (part, 0)
        parts[name] = (part, _create(part))
        return part

    try:
        with locked(target, alone=True):
            yield stage
            for part, mode in parts.values():
                _finish(part, mode)
            for name, (part, _) in parts.items():
                os.replace(part, target / name)
            for old in [each for each in target.iterdir() if obsolete(each.name) and each.name not in parts]:
                old.unlink(missing_ok=True)
    finally:
        for part, _ in parts.values():
            part.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # it holds something
                target.rmdir()


@contextmanager
def locked(directory: str | os.PathLike[str], alone: bool = False) -> Iterator[None]:
    """Waits until nobody fills a directory, and keeps others from it until the end; alone: also those who only read.

    Where the system or the disk has no such locks, nobody waits.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    held = os.open(directory, os.O_RDONLY)
    try:
        with suppress(OSError):
            fcntl.flock(held, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        yield
    finally:
        os.close(held)


def _beside(target: Path) -> Path:
    return target.with_name(f"{target.name}.{os.getpid()}-{secrets.token_hex(4)}.part")


def _create(part: Path) -> int:
    """An empty file, and the mode that the user's umask gives it."""
    with open(part, "xb") as file:
        return os.fstat(file.fileno()).st_mode & 0o777


def _finish(part: Path, mode: int) -> None:
    os.chmod(part, mode)
    with open(part, "rb") as file:
        os.fsync(file.fileno())
