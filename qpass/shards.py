"""A model in a directory, as transformers keeps one: weights in shards of a limited size, an index, config files beside them.

    config.json  generation_config.json  model.safetensors                                            small enough for one
    config.json  generation_config.json  model-00001-of-00002.safetensors ...  model.safetensors.index.json

What storage.py writes into the header of its one file is in the header of the one shard, or in the index.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qpass.errors import QpassError
from qpass.files import filling, locked
from qpass.storage import check_sums, checked_header, labelled, read

SHARD_SIZE = 5_000_000_000
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
OURS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
CONFIGS = (("config", "config.json"), ("generation_config", "generation_config.json"))


def write_model(
    directory: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    texts: Mapping[str, str],
    shard_size: int | None,
) -> None:
    """Fills a directory with weights, their metadata and other files; other files in it stay, an older model goes.

    Whole, or not at all. shard_size: bytes, a larger tensor has a shard of its own.
    """
    shards = list(split(tensors, SHARD_SIZE if shard_size is None else shard_size))
    one = len(shards) == 1
    names = [SINGLE] if one else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    try:
        with filling(directory, lambda name: bool(OURS.fullmatch(name))) as stage:
            for name, shard in zip(names, shards, strict=True):
                own = {key: t.detach().cpu().contiguous().clone() for key, t in shard.items()}
                save_file(own, stage(name), metadata={"format": "pt", **(metadata if one else {})})
            if not one:
                total = sum(t.nbytes for t in tensors.values())
                places = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
                index = {"metadata": {"total_size": total, **metadata}, "weight_map": places}
                stage(INDEX).write_text(json.dumps(index, indent=1))
            for name, text in texts.items():
                stage(name).write_text(text)
    except (OSError, SafetensorError) as error:
        raise QpassError(f"cannot write {directory}: {error}; free some space or choose another folder.") from error


def split(tensors: Mapping[str, Tensor], limit: int) -> Iterator[dict[str, Tensor]]:
    """Tensors in their order, as many at a time as fit into `limit` bytes, one at least."""
    if not isinstance(limit, int) or limit <= 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise QpassError(f"shard_size is {limit!r}; expected a number of bytes, such as {SHARD_SIZE}.")
    shard: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors.items():
        if shard and size + tensor.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    yield shard


def write_directory(
    directory: str | os.PathLike[str],
    kind: str,
    header: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    texts: Mapping[str, str],
    shard_size: int | None = None,
) -> None:
    """Writes what storage.write writes, as a directory."""
    write_model(directory, tensors, labelled(kind, header, tensors), texts, shard_size)


def read_directory(directory: str | os.PathLike[str], *kinds: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and tensors of what write_directory wrote; a shard that is missing or damaged is named."""
    folder = Path(directory)
    with locked(folder):
        if not (folder / INDEX).is_file():
            if not (folder / SINGLE).is_file():
                raise QpassError(
                    f"{folder} holds neither {SINGLE} nor {INDEX}; it is no saved model, or not all of one."
                )
            return read(folder / SINGLE, *kinds)
        index = _index(folder / INDEX)
        header = checked_header(folder / INDEX, index["metadata"], kinds)
        tensors: dict[str, Tensor] = {}
        for name in dict.fromkeys(index["weight_map"].values()):
            tensors |= _shard(folder, name)
        check_sums(folder, header, tensors)
    return header, tensors


def _index(path: Path) -> dict[str, Any]:
    try:
        index = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise QpassError(f"{path} cannot be read, it is truncated or damaged: {error}.") from error
    if not isinstance(index, dict) or not all(isinstance(index.get(key), dict) for key in ("metadata", "weight_map")):
        raise QpassError(f"{path} is no index of a model in shards: it lacks 'metadata' or 'weight_map'.")
    return index


def _shard(folder: Path, name: str) -> dict[str, Tensor]:
    path = folder / name
    if not OURS.fullmatch(name):
        raise QpassError(
            f"{folder / INDEX} names a shard {name!r}; expected names such as model-00001-of-00002.safetensors."
        )
    if not path.is_file():
        raise QpassError(f"the shard {path} is missing, and {INDEX} lists it; copy all files of the directory.")
    try:
        with safe_open(str(path), "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise QpassError(f"{path} cannot be read, it is truncated or damaged: {error}.") from error


def config_texts(model: nn.Module, **more: Any) -> dict[str, str]:
    """config.json and generation_config.json of a model that has such configurations, as transformers writes them.

    more: further entries of config.json.
    """
    texts = {}
    for attribute, name in CONFIGS:
        held = getattr(model, attribute, None)
        if not hasattr(held, "to_json_string"):
            continue
        held = copy.deepcopy(held)
        if attribute == "config":
            held.architectures = [type(model).__name__]
            held.dtype = str(getattr(model, "dtype", "float32")).removeprefix("torch.")
            texts[name] = json.dumps(json.loads(held.to_json_string()) | more, indent=2, sort_keys=True) + "\n"
        else:
            texts[name] = held.to_json_string()
    return texts
