"""Measured configurations on disk: a file for each GPU, the user's before the one that ships.

    <cache>/kernels/<gpu>.json            what `tuning.tune` measured here
    qpass_kernels/tuned/<gpu>.json        what ships

<cache> is $QPASS_CACHE, else $XDG_CACHE_HOME/qpass, else ~/.cache/qpass. A file that cannot be read, or was written for
another GPU, Triton or version of the kernels, is as good as none: it is ignored, and replaced at the next measurement.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from qpass_kernels.configs import Config, bucket, why_no_convolution
from qpass_kernels.launch import Chip

try:
    import fcntl
except ImportError:  # Windows: two processes that write in the same moment may lose an entry
    fcntl = None

LOG = logging.getLogger("qpass")
VERSION = 1  # raise it when a kernel changes so that other tiles are best
SHIPPED = Path(__file__).parent / "tuned"
CONV = re.compile(r"conv\d+x\d+(s\d+x\d+)?c\d+g\d+")  # configs.conv_kind
KINDS = ("w8a8", "fp8", "w8a16", "w4a16", "w4a8")
Key = tuple[str, int, int, int]  # kind, bucket of M, N, K
Entry = tuple[Config, float]  # microseconds a call

_tables: dict[str, dict[Key, Config]] = {}
_said: set[str] = set()


def known(kind: str, m: int, n: int, k: int, chip: Chip) -> Config | None:
    """The configuration measured for a product [M, K] x [N, K], if one was: a look-up in memory after the first call.

    kind: one of KINDS, or configs.conv_kind: then M is pixels, N outputs of a group, K a row of the packed weight.
    """
    table = _tables.get(chip.name)
    if table is None:
        table = _tables[chip.name] = _loaded(chip)
    return table.get((kind, bucket(m, kind), n, k))


def remember(entries: dict[Key, Entry], chip: Chip) -> None:
    """Keeps measurements: in this process, and on disk where that can be written."""
    known("w8a8", 1, 1, 1, chip)
    _tables[chip.name].update({key: config for key, (config, _) in entries.items()})
    path = user_file(chip)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            write(path, _entries(path, chip) | entries, chip)
    except OSError as error:
        _say(f"{path}: measured kernels are kept for this process only: {error}")


def forget() -> None:
    """Reads the files again at the next look-up."""
    _tables.clear()
    _said.clear()


def slug(name: str) -> str:
    """A GPU's name as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "unnamed"


def user_file(chip: Chip) -> Path:
    """Where measurements of this user lie."""
    base = os.environ.get("QPASS_CACHE")
    if not base:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        base = os.path.join(home, "qpass")
    return Path(base) / "kernels" / f"{slug(chip.name)}.json"


def read(path: Path, chip: Chip, compiled_by: str | None = None) -> dict[Key, Entry]:
    """The entries of a file; ValueError where it is not one of this chip, version and, where given, Triton."""
    try:
        held = json.loads(path.read_text("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(held, dict) or not isinstance(held.get("entries"), dict):
        raise ValueError("not a file of measured kernels")
    wanted = {"version": VERSION, "chip": chip.name, **({"triton": compiled_by} if compiled_by else {})}
    for name, value in wanted.items():
        if held.get(name) != value:
            raise ValueError(f"its {name} is {held.get(name)!r}, not {value!r}")
    found = {_key(text): _entry(fields) for text, fields in held["entries"].items()}
    for (kind, *_), (config, _us) in found.items():
        why = why_no_convolution(config, chip) if kind not in KINDS else None
        if why:
            raise ValueError(f"not a configuration of {kind}: {why}")
    return found


def write(path: Path, entries: dict[Key, Entry], chip: Chip) -> None:
    """Writes a file as a whole or not at all."""
    held = {
        "version": VERSION,
        "chip": chip.name,
        "triton": triton.__version__,
        "torch": torch.__version__,
        "entries": {
            f"{kind} {m} {n}x{k}": {"us": round(us, 3), **config.to_json()}
            for (kind, m, n, k), (config, us) in sorted(entries.items())
        },
    }
    handle, made = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(held, file, indent=1)
        os.replace(made, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(made)
        raise


def _loaded(chip: Chip) -> dict[Key, Config]:
    entries = _entries(SHIPPED / f"{slug(chip.name)}.json", chip, shipped=True) | _entries(user_file(chip), chip)
    return {key: config for key, (config, _) in entries.items()}


def _entries(path: Path, chip: Chip, shipped: bool = False) -> dict[Key, Entry]:
    try:
        return read(path, chip, None if shipped else triton.__version__)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _say(f"{path}: measured kernels are ignored: {error}")
        return {}


def _key(text: str) -> Key:
    kind, m, shape = [*text.split(" "), "", ""][:3]
    found = re.fullmatch(r"(\d+)x(\d+)", shape)
    if not (kind in KINDS or CONV.fullmatch(kind)) or not m.isdecimal() or found is None:
        raise ValueError(f"not a kind and a shape: {text!r}")
    return kind, int(m), int(found[1]), int(found[2])


def _entry(fields: object) -> Entry:
    us = fields.get("us") if isinstance(fields, dict) else None
    if not isinstance(us, (int, float)):
        raise ValueError(f"not a measurement: {fields}")
    config = Config.from_json({name: value for name, value in fields.items() if name != "us"})
    if any(size & (size - 1) for size in (config.bm, config.bn, config.bk, config.warps)):
        raise ValueError(f"tiles and warps are powers of two: {fields}")
    return config, float(us)


@contextlib.contextmanager
def _locked(path: Path, patience: float = 5.0) -> Iterator[None]:
    """Alone with a file; goes on without the lock where that takes too long or the disk has none."""
    with open(path.with_suffix(".lock"), "w") as held:
        until = time.monotonic() + patience
        while fcntl is not None:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    break
                time.sleep(0.01)
            except OSError:
                break
        yield


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        LOG.warning("%s", text)
