"""What an interrupted search has found so far, on disk: the plan of each candidate, and the losses of each batch.

    DIR/search-<digest>/w4a16.plan              a candidate's plan, as soon as all of its sites are rounded
    DIR/search-<digest>/losses-<digest>.json    the sums of what is measured, after each batch (or each run of a function)

The first digest is of the model's tensors, the calibration and the recipe: a search with other candidates finds the plans of
those that it shares. The second is of the candidates, the metric and the batches that are measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qpass.errors import QpassError
from qpass.files import replacing
from qpass.plan import Plan
from qpass.resume import prepare
from qpass.storage import digest, load_plan, save_plan

LOG = logging.getLogger("qpass")


class Kept:
    """The directory of one search; without one nothing is kept."""

    def __init__(self, directory: str | os.PathLike[str] | None, made_of: str, measured: str) -> None:
        self.folder: Path | None = None
        self.measured = measured
        if directory is not None:
            self.folder = Path(directory) / f"search-{made_of}"
            prepare(self.folder)

    def plan(self, name: str) -> Plan | None:
        """A candidate's plan, where it is there whole."""
        path = self._path(f"{_safe(name)}.plan")
        if path is None or not path.exists():
            return None
        try:
            return load_plan(path)
        except QpassError as error:
            LOG.warning("%s It is made again.", error)
            return None

    def keep_plan(self, name: str, plan: Plan) -> None:
        """Writes a candidate's plan."""
        if (path := self._path(f"{_safe(name)}.plan")) is not None:
            save_plan(plan, path)

    def data(self, name: str) -> dict[str, Any]:
        """What was kept under a name; nothing where it is missing or damaged."""
        path = self._path(f"{name}-{self.measured}.json")
        try:
            found = {} if path is None else json.loads(path.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def keep(self, name: str, data: Mapping[str, Any]) -> None:
        """Writes data under a name."""
        if (path := self._path(f"{name}-{self.measured}.json")) is not None:
            with replacing(path) as part:
                part.write_text(json.dumps(data))

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / name


def _safe(name: str) -> str:
    return re.sub(r"[^\w.=-]", "_", name)


def made_of(model: nn.Module | None, batches: Iterable[Any], *others: object) -> str:
    """A digest of a model's tensors, of batches, and of the text of all else."""
    found = hashlib.blake2b(digest_size=8)
    owner = nn.Module() if model is None else model
    tensors = (*owner.named_parameters(remove_duplicate=False), *owner.named_buffers(remove_duplicate=False))
    for name, tensor in tensors:
        found.update(f"{name} {digest(tensor)}".encode())
    for leaf in torch.utils._pytree.tree_leaves(list(batches)):
        found.update((digest(leaf) if isinstance(leaf, Tensor) else repr(leaf)).encode())
    found.update(repr(others).encode())
    return found.hexdigest()


def digest_of(choice: Mapping[str, str]) -> str:
    """A short name of a choice by group."""
    return hashlib.blake2b(repr(sorted(choice.items())).encode(), digest_size=4).hexdigest()
