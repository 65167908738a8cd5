"""Files of a report: written whole or not at all; a path that cannot be written is an error that names it."""

from __future__ import annotations

import os
from pathlib import Path

from qpass.errors import QpassError
from qpass.files import replacing


def written(path: str | os.PathLike[str], text: str) -> None:
    """Writes text, UTF-8, in place of what was there."""
    if Path(path).is_dir():
        raise QpassError(f"cannot write {path}: it is a directory; name a file in it.")
    try:
        with replacing(path) as part:
            part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise QpassError(f"cannot write {path}: {error}; free some space or choose another folder.") from error
