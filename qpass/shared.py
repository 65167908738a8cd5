"""Tensors that several graphs hold are kept once: a prompt's graph and a token's have the same weights.

Each graph is lowered by itself, so each would make a copy of what the backend has laid out, joined or folded. Equal ones
are found by a checksum of their values (blake2b, 128 bits, with dtype, shape and strides), for all models of the process.
Nothing is kept alive here: a tensor goes when the last graph that holds it does.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, fx

SMALL = 4096  # bytes; below it a copy costs less than the look
_KNOWN: weakref.WeakValueDictionary[tuple, Tensor] = weakref.WeakValueDictionary()
_LOCK = threading.Lock()


def made_once(kind: str, source: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
    """`make(source)`, or what an equal source was made into for another graph. The result must not be written to."""
    key = (kind, *_key(source))
    with _LOCK:
        found = _KNOWN.get(key)
    if found is None:
        found = make(source)
        with _LOCK:
            found = _KNOWN.setdefault(key, found)
    return found


def share_constants(gm: fx.GraphModule) -> int:
    """Replaces constants of a graph by equal ones of other graphs; returns how many. The model's own tensors are left."""
    values = [node.meta.get("value") for node in gm.graph.nodes if node.op == "placeholder"]
    own = {value.untyped_storage().data_ptr() for value in values if isinstance(value, Tensor) and not value.is_mkldnn}
    shared = 0
    for name, tensor in list(gm._buffers.items()):
        if not _sharable(tensor) or tensor.untyped_storage().data_ptr() in own:
            continue
        found = made_once("constant", tensor, lambda t: t)
        if found is not tensor:
            gm._buffers[name] = found
            shared += 1
    return shared


def _sharable(tensor: Tensor | None) -> bool:
    """Whether a tensor is large, and values in memory that can be read."""
    if tensor is None or type(tensor) is not Tensor or tensor.is_mkldnn or tensor.layout is not torch.strided:
        return False
    return tensor.nbytes >= SMALL


def _key(tensor: Tensor) -> tuple:
    values = tensor.detach().cpu().contiguous().reshape(-1)
    digest = hashlib.blake2b(values.view(torch.uint8).numpy(), digest_size=16).digest() if values.numel() else b""
    return digest, tensor.dtype, tuple(tensor.shape), tensor.stride(), str(tensor.device)
