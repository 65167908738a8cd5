"""Convolutions and pools that follow each other become one call (src/chain.cpp).

    a = image_codes(x); b = packed_conv(a, ..); c = packed_max_pool(b); d = packed_conv(c, ..)   ->   d = chain(x)

Of a batch each thread takes one image after the other through the whole chain. What nobody else reads lies in a buffer
of the thread, where values that are not alive at once share their room.
"""

from __future__ import annotations

import ctypes
import math
import operator
import struct
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qpass.backends.native.arguments import OUT_TYPES, STEP
from qpass.backends.native.build import library
from qpass.backends.native.conv_calls import REMEMBERED, ConvBlock, PoolBlock, empty_image
from qpass.backends.native.conv_ops import pixel_stride
from qpass.backends.native.image import ImageBlock

Q = torch.ops.qpass
CONV, POOL, IMAGE = range(3)  # enum Kind of src/chain.cpp
BUFFER, NOWHERE = -1, -2  # where a tensor of a step lies, if it is none of the call's
SLACK = 64  # bytes that a kernel may read behind a tensor; of a cache line too
BLOCKS: dict[Any, tuple[int, type]] = {
    Q.packed_conv.default: (CONV, ConvBlock),
    Q.packed_max_pool.default: (POOL, PoolBlock),
    Q.image_codes.default: (IMAGE, ImageBlock),
}
FUNCTIONS: dict[str, tuple[tuple[Any, ...], Any]] = {
    "qpass_chain_new": ((ctypes.c_void_p, *(ctypes.c_int64,) * 4), ctypes.c_void_p),
    "qpass_chain_run": ((ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int32),
    "qpass_chain_free": ((ctypes.c_void_p,), None),
}
OTHER = 8  # argument of packed_conv


@dataclass(frozen=True)
class Step:
    """One kernel of a chain. x, other: names of values it reads."""

    kind: int
    block: Any
    x: str
    other: str | None
    out: str
    dtype: torch.dtype


def is_link(node: fx.Node) -> bool:
    """Whether a node can be a step of a chain: its codes have one zero point for all images."""
    return node.target in BLOCKS and (node.target is not Q.packed_conv.default or node.args[6] is None)


def join_chains(gm: fx.GraphModule) -> int:
    """Makes each run of two and more such nodes one call; returns the number of calls made."""
    made, run, behind = 0, [], []  # behind: what depends on the run and is no part of it
    for node in [*gm.graph.nodes, None]:
        if node is not None and not run:
            run = [node] if is_link(node) else []
            continue
        reads = [] if node is None else node.all_input_nodes
        late = node is None or any(n in behind for n in reads)
        if node is not None and not late and is_link(node) and _batch(node) == _batch(run[0]):
            run.append(node)
        elif node is None or (late and is_link(node)):
            made += _join(gm, run, behind)
            run, behind = [] if node is None else [node], []
        elif node.op != "output" and (late or any(n in run for n in reads)):
            behind.append(node)
    gm.graph.lint()
    return made


def _batch(node: fx.Node) -> str:
    return str(node.meta["val"].shape[0])


def _join(gm: fx.GraphModule, run: list[fx.Node], behind: list[fx.Node]) -> int:
    if len(run) < 2:
        return 0
    inside = set(run)
    given = list(dict.fromkeys(n for node in run for n in _images(node) if n not in inside))
    results = [node for node in run if any(user not in inside for user in node.users)]
    steps = [_step(node) for node in run]
    names = [n.name for n in given], [n.name for n in results]
    with gm.graph.inserting_after(run[-1]):
        call = gm.graph.create_node("call_function", chain_call(steps, *names), tuple(given), name="chain")
    call.meta["val"] = tuple(node.meta["val"] for node in results)
    last = call
    for i, node in enumerate(results):
        with gm.graph.inserting_after(last):
            last = gm.graph.call_function(operator.getitem, (call, i))
        last.meta |= node.meta
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for node in behind:
        if node < call:
            last.append(node)
            last = node
    for node in reversed(run):
        gm.graph.erase_node(node)
    return 1


def _images(node: fx.Node) -> list[fx.Node]:
    """What a step reads besides constants."""
    found: list[Any] = [node.args[0], node.args[OTHER] if node.target is Q.packed_conv.default else None]
    return [n for n in found if n is not None]


def _step(node: fx.Node) -> Step:
    kind, block = BLOCKS[node.target]
    x, *other = (n.name for n in _images(node))
    return Step(kind, block(node), x, other[0] if other else None, node.name, node.meta["val"].dtype)


@dataclass(frozen=True)
class Use:
    """How the steps want a tensor of the call: float images as they are, codes channels last."""

    planes: bool  # contiguous
    strided: bool  # or, channels last, some channels of a wider image


def chain_call(steps: Sequence[Step], given: Sequence[str], results: Sequence[str]) -> Callable[..., Any]:
    """A function of the tensors `given` that runs the steps and returns the tensors `results`."""
    uses = [_use(name, steps) for name in given]
    launch, threads = _function("qpass_chain_run"), torch.get_num_threads
    pointers = struct.Struct(f"{len(given) + len(results)}P").pack
    known: dict[Any, tuple[list[tuple[Any, Any]], Any]] = {}

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        held, key = [], [threads()]
        for tensor, use in zip(tensors, uses, strict=True):
            tensor, ld = _laid_out(tensor, use)
            held.append(tensor)
            key.append((tensor.shape, ld, tensor.dtype))
        plan = known.get(tuple(key))
        if plan is None:
            if len(known) > REMEMBERED:
                known.clear()
            plan = known[tuple(key)] = _plan(steps, dict(zip(given, key[1:], strict=True)), results, key[0])
        made, chain = plan
        out = tuple(empty(shape, dtype) for empty, shape, dtype in made)
        if launch(chain.handle, pointers(*(t.data_ptr() for t in held), *(t.data_ptr() for t in out))):
            raise MemoryError(f"no memory for what lies between {len(steps)} convolutions; a smaller batch needs less")
        return out

    return run


def _use(name: str, steps: Sequence[Step]) -> Use:
    readers = [step for step in steps if name in (step.x, step.other)]
    planes = any(step.kind == IMAGE for step in readers)
    strided = all(step.kind == CONV and step.other != name and not step.block.fold for step in readers)
    return Use(planes, strided)


def _laid_out(x: Tensor, use: Use) -> tuple[Tensor, int]:
    """A tensor as its steps want it, and the elements from a pixel of it to the next."""
    channels = x.shape[1]
    if use.planes:
        return x.contiguous(), channels
    ld = pixel_stride(x)
    if ld == channels or (ld is not None and use.strided):
        return x, ld
    return x.movedim(1, -1).contiguous().movedim(-1, 1), channels


class Chain:
    """A chain of the library for one size of images, freed with this object."""

    def __init__(self, steps: bytes, count: int, batch: int, threads: int, room: int) -> None:
        self.handle = _function("qpass_chain_new")(steps, count, batch, threads, room)
        weakref.finalize(self, _function("qpass_chain_free"), self.handle)


def _function(name: str) -> Callable[..., Any]:
    function = getattr(library(), name)
    function.argtypes, function.restype = FUNCTIONS[name]
    return function


def _plan(steps: Sequence[Step], given: dict[str, Any], results: Sequence[str], threads: int):
    """(the empties of the results, the chain). given: (shape, elements a pixel, dtype) of each tensor of the call."""
    values = {name: (tuple(shape), ld, dtype) for name, (shape, ld, dtype) in given.items()}
    batch = next(iter(values.values()))[0][0]
    blocks = []
    for step in steps:
        shape, ld, _ = values[step.x]
        if step.kind == CONV:
            kind = -1 if step.other is None else OUT_TYPES[values[step.other][2]]
            shape, block = step.block.describe(batch, shape[2:], ld, kind, threads)
        else:
            block = step.block.pack(shape, threads)
            shape = step.block.shape(shape) if step.kind == POOL else shape
        values[step.out] = shape, shape[1], step.dtype
        blocks.append(block)
    outer = {name: i for i, name in enumerate((*given, *results))}
    offsets, room = place(steps, {n: _bytes(v) for n, v in values.items() if n not in outer})

    def ref(name: str | None) -> tuple[int, int, int]:
        if name is None:
            return NOWHERE, 0, 0
        size = _bytes(values[name])
        return (outer[name], 0, size) if name in outer else (BUFFER, offsets[name], size)

    text = b"".join(
        STEP.pack(step.kind, *ref(step.x), *ref(step.out), *ref(step.other), block)
        for step, block in zip(steps, blocks, strict=True)
    )
    made = [(empty_image(len(values[n][0]) - 2), values[n][0], values[n][2]) for n in results]
    return made, Chain(text, len(steps), batch, threads, room)


def _bytes(value: tuple[tuple[int, ...], int, torch.dtype]) -> int:
    """Of one image."""
    shape, ld, dtype = value
    return ld * math.prod(shape[2:]) * dtype.itemsize


def place(steps: Sequence[Step], sizes: dict[str, int]) -> tuple[dict[str, int], int]:
    """Offsets of the values in one buffer, and its size: those that are alive at once do not overlap.

    The largest first, each at the lowest offset that is free for as long as it lives.
    """
    born = {step.out: i for i, step in enumerate(steps)}
    last = {name: i for i, step in enumerate(steps) for name in (step.out, step.x, step.other)}
    placed: list[tuple[int, int, str]] = []
    for name in sorted(sizes, key=lambda n: -sizes[n]):
        size = -(-(sizes[name] + SLACK) // SLACK) * SLACK
        alive = sorted(p for p in placed if born[p[2]] <= last[name] and born[name] <= last[p[2]])
        start = 0
        for begin, end, _ in alive:
            if start + size <= begin:
                break
            start = max(start, end)
        placed.append((start, start + size, name))
    return {name: start for start, _, name in placed}, max((end for _, end, _ in placed), default=0)
