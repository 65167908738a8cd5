"""The report's page: one HTML file that opens offline, with its styles, scripts, libraries and data in it."""

from __future__ import annotations

import os
from typing import Any

from qpass.errors import QpassError
from qpass.files import replacing
from qpass.inspect.page.assemble import pieces
from qpass.inspect.page.collapse import collapsed


def write(document: dict[str, Any], path: str | os.PathLike[str], depth: int | None = None) -> None:
    """Writes a report's document (`Report.document()`) as one HTML file: whole, or not at all.

    depth: what lies deeper in the module tree than this many names becomes one node a module; None keeps every node.
    Raises QpassError where the graph has too many nodes for a page, or the file cannot be written.
    """
    page = pieces(collapsed(document, depth))
    try:
        with replacing(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(page)
    except OSError as error:
        reason = error.strerror or str(error)
        raise QpassError(
            f"the page cannot be written to {os.fspath(path)!r}: {reason}. Name a file in a directory that exists and "
            "that you may write to."
        ) from error
