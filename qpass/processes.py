"""Several processes that calibrate one model together: each runs batches of its own, and all come to one plan.

    everywhere(value)       what each has, in order of rank
    collected(work)         the same of what each computes; what is wrong on one is raised on all
    spread(work, items)     item i is done by process i % count, and all get all results

Without torch.distributed, or alone, each is what its words say of one process. Values travel pickled, between processes that
one user started.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
from torch import distributed
from torch.linalg import LinAlgError

from qpass.errors import QpassError

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = datetime.timedelta(hours=1)  # how long one waits for the others; one that ends is noticed at once
ENDED = (
    "another process of this run has ended, or did not come within {}: see what it has printed; its part is missing, so "
    "there is no plan."
)


def rank() -> int:
    """Which process this is, from 0."""
    return distributed.get_rank() if _joined() else 0


def count() -> int:
    """How many there are."""
    return distributed.get_world_size() if _joined() else 1


def _joined() -> bool:
    return distributed.is_available() and distributed.is_initialized()


@contextmanager
def joined() -> Iterator[None]:
    """Within it the processes that torchrun has started know of each other; one that was started alone is alone.

    Messages of others than the first say which process they are from.
    """
    many = int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1
    if many == 1 or _joined():
        yield
        return
    if not distributed.is_available():
        raise QpassError("this torch is built without torch.distributed; run one process, without torchrun.")
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and distributed.is_nccl_available() else "gloo"
    distributed.init_process_group(backend, timeout=PATIENCE)
    try:
        yield
    except QpassError as error:
        if rank() == 0 or str(error).startswith("process "):
            raise
        raise QpassError(f"process {rank()} of {count()}: {error}") from error
    finally:
        distributed.destroy_process_group()


def mine(items: Iterable[Item]) -> Iterator[Item]:
    """Of items that all processes have, those that are this one's."""
    return islice(items, rank(), None, count())


def everywhere(value: Item) -> list[Item]:
    """What each process has in this place, in order of rank."""
    if count() == 1:
        return [value]
    parts: list[Any] = [None] * count()
    try:
        distributed.all_gather_object(parts, value)
    except RuntimeError as error:  # a broken connection, or a timeout
        raise QpassError(ENDED.format(PATIENCE)) from error
    return parts


def collected(work: Callable[[], Result]) -> list[Result]:
    """What `work` gives on each process; a QpassError or a LinAlgError on one is raised on all of them."""
    found, wrong = None, None
    try:
        found = work()
    except (QpassError, LinAlgError) as error:
        if count() == 1:
            raise
        wrong = error
    outcomes = everywhere((found, None if wrong is None else (isinstance(wrong, QpassError), str(wrong))))
    if wrong is not None:
        raise wrong
    for number, (_, told) in enumerate(outcomes):
        if told is not None:
            ours, text = told
            raise QpassError(f"process {number} of {count()}: {text}") if ours else LinAlgError(text)
    return [result for result, _ in outcomes]  # type: ignore[misc]


def first_alone(work: Callable[..., Result], *args: Any) -> Result:
    """What the first process makes of the arguments, which alone does it; all get it."""
    return collected(lambda: work(*args) if rank() == 0 else None)[0]  # type: ignore[return-value]


def listed(items: Iterable[Item]) -> list[Item]:
    """A list of what this process has; a QpassError while they are made is raised on all."""
    held: list[Item] = []
    collected(lambda: held.extend(items))
    return held


def spread(work: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The results for all items, in order; all processes must come here with the same items."""
    parts = collected(lambda: [work(item) for item in items[rank() :: count()]])
    return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]


def agree(facts: Mapping[str, Any], advice: str) -> None:
    """Raises where a fact is another on one process than on the first; advice: what to do about it."""
    first, *others = everywhere(dict(facts))
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise QpassError(f"process {number} of {count()} has other {name} than process 0: {advice}")
