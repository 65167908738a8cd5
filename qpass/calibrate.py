"""Run a model on calibration batches and write down what its sites see; the model itself is not touched.

Memory does not grow with the batches: each is looked at once and forgotten. Observations of several processes merge
(`gather`), so calibration can be split over workers and gives the plan that one process would have given.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from qpass.capture import capture, front_end, held, tensor_names
from qpass.errors import QpassError
from qpass.frames import bound, module_ids
from qpass.interrupts import stop_if_asked
from qpass.observations import Observations
from qpass.padding import mask_of
from qpass.passes.annotate import describe_sites
from qpass.passes.collect_ranges import CollectRanges
from qpass.passes.simplify import simplify
from qpass.processes import everywhere, rank
from qpass.site_info import SiteInfo
from qpass.sites import SiteNames

Batch = Any
Item = TypeVar("Item")


def call_arguments(batch: Batch, what: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a batch: a tensor, a tuple of positional arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, tuple):
        return batch, {}
    raise QpassError(
        f"{what} is a {type(batch).__name__}; expected a tensor, a tuple of positional arguments or a mapping of "
        "keyword arguments (a list of inputs: make it a tuple)."
    )


def describe(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The arguments of a call in short: dtype and shape of a tensor, the type of anything else."""
    named = [*(("", value) for value in args), *((f"{key}=", value) for key, value in kwargs.items())]
    return ", ".join(name + _short(value) for name, value in named)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Whatever the model's forward does to its own buffers (a counter, a cache) is undone at the end."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; at the end each module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


class Caught(Exception):
    """A call that was stopped where its graph begins: which graph, and its arguments."""

    def __init__(self, index: int, given: tuple[Any, ...]) -> None:
        super().__init__("a captured call was stopped on purpose")
        self.index, self.given = index, given


@dataclass(eq=False)
class Session:
    """One model under observation: its sites in order of execution, their names, and what was seen."""

    model: nn.Module
    observations: Observations = field(default_factory=Observations)
    names: SiteNames = field(default_factory=SiteNames)
    sites: dict[str, SiteInfo] = field(default_factory=dict)
    graphs: list[tuple[fx.GraphModule, dict[str, fx.Node], tuple[Tensor, ...]]] = field(default_factory=list)
    batch: int = 0
    mask: Tensor | None = None  # of the batch that runs, see padding.py
    watching: bool = True
    catching: bool = False  # whether a call is stopped at the start of its graph
    entered: list[int] = field(default_factory=list)  # the graphs that calls came to
    whole: set[int] = field(default_factory=set)  # those that are all there is of a call

    def __post_init__(self) -> None:
        """Prepares the model's captured call."""
        self.tensors, self.modules = tensor_names(self.model), module_ids(self.model)
        self.call = front_end(self.model, self._backend)

    def _backend(self, gm: fx.GraphModule, inputs: Any) -> Any:
        bound(gm)
        graph = capture(gm, inputs, self.tensors, self.modules)
        simplify(graph)
        nodes, infos = describe_sites(graph, self.names)
        for info in infos:
            self.sites.setdefault(info.name, info)
        self.graphs.append((graph, nodes, tuple(held(gm).values())))
        owner, index = weakref.ref(self), len(self.graphs) - 1

        def run(*args: Any) -> Any:  # the front end never forgets it, so it holds neither the session nor a weight
            session = owner()
            assert session is not None
            if session.catching:
                raise Caught(index, args)
            session.entered.append(index)
            graph, nodes, lifted = session.graphs[index]
            return session.interpreter(graph, nodes).run(*args, *lifted)

        return run

    def interpreter(self, graph: fx.GraphModule, nodes: dict[str, fx.Node]) -> fx.Interpreter:
        """What runs a captured graph and looks at its sites on the way."""
        return CollectRanges(graph, nodes, self.observations, self.batch, self.watching, self.mask)

    def run(self, batch: Batch, what: str) -> Any:
        """Calls the model on one batch; an error on the way is explained, with the model's own as its cause."""
        args, kwargs = call_arguments(batch, what)
        stop_if_asked()
        self.mask = mask_of(self.model, args, kwargs)
        try:
            return self.call(*args, **kwargs)
        except (QpassError, Caught):
            raise
        except Exception as error:
            cause, why = self._why(error, args, kwargs)
            raise QpassError(f"{what} ({describe(args, kwargs)}): {why}") from cause

    def _why(self, error: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Exception, str]:
        """What failed, and a sentence: the model itself, which is asked again in eager mode, or its capture."""
        kind = type(self.model).__name__
        try:
            with torch.no_grad():
                self.model(*args, **kwargs)
        except Exception as own:
            return own, (
                f"{kind}.forward raised {type(own).__name__}: {own}. The float model does so without qpass; pass inputs "
                "that it runs on, or mend its forward."
            )
        first = (str(error).splitlines() or [""])[0]
        return error, (
            f"{kind} runs on it, but torch.compile's front end could not capture it: {type(error).__name__}: {first}. "
            "See the cause above; torch.compile(model, backend='eager') shows whether it is the front end alone."
        )


def observe(session: Session, batches: Iterable[Batch]) -> int:
    """Runs every calibration batch; returns their number. Shows a progress bar on a terminal."""
    count = 0
    for count, batch in enumerate(progress(batches), 1):
        session.batch = count - 1
        session.run(batch, f"calibration batch {count - 1}")
    return count


def progress(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches, with a bar on standard error where that is a terminal."""
    return shown(batches, "calibrating")


def shown(items: Iterable[Item], what: str, name: Callable[[Item], str] | None = None) -> Iterator[Item]:
    """The items, with a bar on standard error where that is a terminal, by the first process; name: what to show of one."""
    if not sys.stderr.isatty() or rank():
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress

    total = len(items) if hasattr(items, "__len__") else None  # type: ignore[arg-type]
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            if name is not None:
                bar.update(task, description=f"{what} {name(item)}")
            yield item
            bar.advance(task)


def gather(observations: Observations) -> Observations:
    """Every process's observations merged, in order of rank, the same on each; without torch.distributed, as given."""
    merged, *parts = everywhere(observations)
    for part in parts:
        merged.merge(part)
    return merged
