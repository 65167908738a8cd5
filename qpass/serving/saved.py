"""What a monitor saw, as a file: safetensors with JSON in its header, as plans are. Files of several workers merge.

A file names the plan it is of by a fingerprint of its static inputs, so that counts on one grid are not added to another's.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from qpass.errors import QpassError
from qpass.plan import Plan
from qpass.ranges import Range
from qpass.serving.collect import Bins, Stats
from qpass.storage import digest, read, write

KIND = "monitor"
COUNTS = ("looks", "samples", "values", "below", "above")
BINS = ("counts", "squares", "crossed")
OTHER = (
    "{} was written by a monitor of another plan: another model, or this one before or after a recalibration. Merge files of "
    "models that were compiled from one plan."
)


def fingerprint(plan: Plan) -> str:
    """Equal for plans whose static inputs have the same sites, types, scales, zero points and calibration."""
    found = hashlib.blake2b(digest_size=16)
    for d in plan:
        if d.static:
            tensors = (d.input_scale, d.input_zero, d.input_mul, d.seen and d.seen.edges, d.seen and d.seen.shares)
            parts = [d.site, d.input_type, d.weight_type, d.made_from, *(t is not None and digest(t) for t in tensors)]
            found.update("\n".join(map(str, parts)).encode())
    return found.hexdigest()


def save(path: str | os.PathLike[str], plan: Plan, model: str, stats: Mapping[str, Stats]) -> None:
    """Writes what was seen, whole or not at all."""
    entries, tensors = {}, {}
    for site, seen in stats.items():
        entries[site] = {name: getattr(seen, name) for name in COUNTS}
        tensors |= {f"{site}|grid|{name}": t for name, t in seen.grid.to_tensors().items()}
        if seen.raw is not None:
            tensors |= {f"{site}|raw|{name}": t for name, t in seen.raw.to_tensors().items()}
        if seen.reach is not None:
            tensors[f"{site}|reach"] = seen.reach
        if seen.bins is not None:
            entries[site] |= {"total": seen.bins.total, "total_square": seen.bins.total_square}
            tensors |= {f"{site}|bins|{name}": getattr(seen.bins, name) for name in BINS}
    write(path, KIND, {"plan_of": fingerprint(plan), "model": model, "sites": entries}, tensors)


def load(path: str | os.PathLike[str], plan: Plan) -> dict[str, Stats]:
    """Reads what was seen; QpassError where the file is damaged, of another kind, or of another plan."""
    header, tensors = read(path, KIND)
    if header["plan_of"] != fingerprint(plan):
        raise QpassError(OTHER.format(os.fspath(path)))
    return {site: _stats(entry, _under(tensors, site)) for site, entry in header["sites"].items()}


def _under(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}|"): t for key, t in tensors.items() if key.startswith(f"{name}|")}


def _stats(entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Stats:
    grid, raw, bins = (_under(tensors, name) for name in ("grid", "raw", "bins"))
    return Stats(
        *(int(entry[name]) for name in COUNTS),
        Range.from_tensors(grid),
        Range.from_tensors(raw) if raw else None,
        tensors.get("reach"),
        Bins(*(bins[name] for name in BINS), entry["total"], entry["total_square"]) if bins else None,
    )
