"""Plans and compiled models on disk: one safetensors file, JSON in its header. Nothing is unpickled.

A file holds tensors, and in its metadata `qpass`: the format's version, what it is, the plan as JSON, and a checksum of
every tensor. A model's file also holds its other parameters and buffers, so that it loads into a fresh float model.
Files are written beside their place and moved there, so a full disk or an interrupt leaves the old file as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qpass.errors import QpassError
from qpass.files import replacing
from qpass.packing import Packed, pack
from qpass.plan import Decision, Plan
from qpass.qtype import QType
from qpass.schemes import Scheme
from qpass.seen import Seen

VERSION = 2  # 1 held one code a byte
ATTEMPTS = 20  # to read a file that another process replaces meanwhile: header and tensors are opened one by one
PLAIN = (
    "site",
    "operation",
    "weight",
    "transposed",
    "rows",
    "why",
    "group",
    "lo",
    "hi",
    "note",
    "made_from",
    "bias_name",
)
PACKED = {"data": "stored", "scale": "scale", "in_mul": "in_mul", "zero": "stored_zero"}  # in a file, in Packed
TENSORS = ("input_scale", "input_zero", "input_mul", "input_shift", "input_extra", "bias")
SEEN = ("seen_edges", "seen_shares")  # with `clipped` in the entry; files of before monitoring lack them


def digest(tensor: Tensor) -> str:
    """A checksum of a tensor's bytes, dtype and shape."""
    data = tensor.detach().cpu().contiguous()
    found = hashlib.blake2b(f"{data.dtype}{tuple(data.shape)}".encode(), digest_size=16)
    if data.numel():
        found.update(data.reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def fingerprint(weight: Tensor) -> str:
    """A checksum of a weight's values rounded to bfloat16, so that the same model in bfloat16 has it too."""
    return digest(weight.to(torch.bfloat16))


def write(path: str | os.PathLike[str], kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Writes a file of a kind ("plan", "model"), whole or not at all."""
    held = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
    try:
        with replacing(path) as part:
            save_file(held, part, metadata=labelled(kind, header, held))
    except (OSError, SafetensorError) as error:
        raise QpassError(f"cannot write {path}: {error}; free some space or choose another folder.") from error


def labelled(kind: str, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What says of a file what it is, and what its tensors are: a text and its checksum."""
    sums = {name: digest(t) for name, t in tensors.items()}
    text = json.dumps({"version": VERSION, "kind": kind, "checksums": sums, **header})
    return {"qpass": text, "checksum": _text_digest(text)}


def read(path: str | os.PathLike[str], *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of a file of one of some kinds; a damaged, foreign or newer file is refused with a sentence."""
    target = Path(path)
    for attempt in range(ATTEMPTS):
        before = _identity(target)
        try:
            return _read(target, kinds)
        except QpassError:
            if attempt == ATTEMPTS - 1 or before == _identity(target):
                raise
    raise AssertionError("the last attempt returns or raises")


def _identity(target: Path) -> tuple[int, int]:
    if not target.is_file():
        raise QpassError(f"there is no file {target}.")
    found = target.stat()
    return found.st_ino, found.st_mtime_ns


def _read(target: Path, kinds: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(str(target), "pt") as file:
            header = checked_header(target, file.metadata() or {}, kinds)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QpassError(f"{target} cannot be read, it is truncated or damaged: {error}.") from error
    check_sums(target, header, tensors)
    return header, tensors


def checked_header(target: Path, metadata: Mapping[str, str], kinds: tuple[str, ...]) -> dict[str, Any]:
    """The header in what `labelled` made; one that is foreign, damaged or newer is refused."""
    try:
        header = json.loads(metadata.get("qpass", "null"))
    except (json.JSONDecodeError, TypeError) as error:
        raise QpassError(f"{target} cannot be read, it is truncated or damaged: {error}.") from error
    if not isinstance(header, dict):
        raise QpassError(f"{target} is a safetensors file, but not one that qpass wrote.")
    _check_header(target, header, kinds)
    if metadata.get("checksum") != _text_digest(metadata["qpass"]):
        raise QpassError(f"{target} is damaged: the checksum of its header does not match; save it again.")
    return header


def check_sums(target: Path, header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """The tensors are those that were written."""
    sums = header["checksums"]
    if sums.keys() != tensors.keys():
        raise QpassError(f"{target} is damaged: its tensors are not those its header lists; save it again.")
    for name, tensor in tensors.items():
        if digest(tensor) != sums[name]:
            raise QpassError(f"{target} is damaged: the checksum of {name!r} does not match; save it again.")


def _text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _check_header(target: Path, header: dict[str, Any], kinds: tuple[str, ...]) -> None:
    version = header.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise QpassError(f"{target} has format version {version}, this qpass reads up to {VERSION}; update qpass.")
    if header.get("kind") not in kinds:
        raise QpassError(f"{target} holds a {header.get('kind')}, expected a {' or a '.join(kinds)}.")


def plan_to_data(plan: Plan) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A plan as JSON data and named tensors."""
    decisions, tensors = [], {}
    for d in plan:
        entry = {key: getattr(d, key) for key in PLAIN} | {"shape": list(d.shape)}
        entry |= {key: str(value) for key in ("weight_type", "input_type") if (value := getattr(d, key)) is not None}
        decisions.append(entry)
        packed = d.packed
        found = {key: getattr(d, key) for key in TENSORS}
        if packed is not None:
            entry["packed_type"] = str(packed.type)
            entry["halves"] = packed.halves
            found |= {key: getattr(packed, field) for key, field in PACKED.items()}
        if d.seen is not None:
            entry["clipped"] = d.seen.clipped
            found |= dict(zip(SEEN, (d.seen.edges, d.seen.shares), strict=True))
        tensors |= {f"{d.site}|{key}": t for key, t in found.items() if t is not None}
    attention = None if plan.attention is None else str(plan.attention).removeprefix("torch.")
    data = {"scheme": str(plan.scheme), "parameters": plan.parameters, "attention": attention, "notes": plan.notes}
    return data | {"front": plan.front, "decisions": decisions}, tensors


def plan_from_data(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Plan:
    """The plan that plan_to_data wrote down."""
    attention = getattr(torch, data["attention"]) if data["attention"] else None
    plan = Plan(Scheme.parse(data["scheme"]), {}, data["parameters"], attention, list(data["notes"]))
    plan.front = data.get("front")
    for entry in data["decisions"]:
        held = {key: tensors.get(f"{entry['site']}|{key}") for key in (*PACKED, *TENSORS, *SEEN)}
        packed = None
        if "packed_type" in entry:
            qtype = QType.parse(entry["packed_type"])
            packed = _packed({key: held[key] for key in PACKED}, qtype, entry.get("halves"))
        plan.decisions[entry["site"]] = Decision(
            **{key: entry[key] for key in PLAIN if key in entry},
            shape=tuple(entry["shape"]),
            weight_type=QType.parse(entry["weight_type"]) if "weight_type" in entry else None,
            input_type=QType.parse(entry["input_type"]) if "input_type" in entry else None,
            **{key: held[key] for key in TENSORS},
            packed=packed,
            seen=None if held[SEEN[0]] is None else Seen(*(held[key] for key in SEEN), entry.get("clipped", 0.0)),
        )
    return plan


def _packed(held: Mapping[str, Any], qtype: QType, by_halves: bool | None) -> Packed:
    """by_halves: None in a file of version 1."""
    if by_halves is None:
        return pack(held["data"], held["scale"], qtype, held["in_mul"], held["zero"])
    return Packed(held["data"], held["scale"], qtype, held["in_mul"], held["zero"], by_halves)


def save_plan(plan: Plan, path: str | os.PathLike[str]) -> None:
    """Writes a plan."""
    data, tensors = plan_to_data(plan)
    write(path, "plan", {"plan": data}, tensors)


def load_plan(path: str | os.PathLike[str]) -> Plan:
    """Reads a plan."""
    header, tensors = read(path, "plan")
    return plan_from_data(header["plan"], tensors)
