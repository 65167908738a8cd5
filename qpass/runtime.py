"""What runs when a compiled model is called: each graph the front end captures goes through the pipeline once.

    front end -> capture -> passes.ORDER -> backend -> a Python callable that takes the graph's inputs

Weights that were prepared for the backend are constants of that callable. If such a tensor of the model is later
replaced or written to (load_state_dict, .to), the graph runs in eager mode with what it is given, and a warning says so.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx, nn

from qpass.backends import Backend
from qpass.backends.cuda_graphs import MODES, replayed, static_inputs
from qpass.calls import installed, removed
from qpass.capture import capture, held, tensor_names
from qpass.checks import check_one_width
from qpass.frames import bound, module_ids
from qpass.install import uninstall
from qpass.passes import ORDER
from qpass.pipeline import Context, Settings, run_pipeline
from qpass.plan import Plan
from qpass.self_watched import all_real, empty, hint, watched
from qpass.served import Kept, Made, Record, Served, twin
from qpass.shared import share_constants
from qpass.sites import SiteNames
from qpass.source_lines import source_lines
from qpass.watch import OURS, Watch


@dataclass(repr=False)
class Runtime:
    """Compiles the graphs of one model by its plan; a torch.compile backend. mode: one of cuda_graphs.MODES."""

    plan: Plan
    backend: Backend
    model: weakref.ref[nn.Module] | None = None
    tensors: Mapping[int, str] | None = None
    names: SiteNames = field(default_factory=SiteNames)
    records: list[Record] = field(default_factory=list)
    mode: str = "default"
    watch: weakref.ref[Watch] | None = None  # the model holds it: it refers to all that hangs there
    lock: Any = field(default_factory=threading.RLock)
    kept: list[Kept] = field(default_factory=list)  # the graphs of a model that qpass.compile has made
    made: list[Made] = field(default_factory=list)  # what each of them is lowered to now
    monitor: Any = None  # of qpass/serving: sees each call, and each graph as it comes

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """One captured graph -> what runs in its place."""
        with self.lock:
            return self._build(gm, inputs)

    def _build(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        bound(gm)
        model = self.model() if self.model else None
        names = tensor_names(model) if model is not None else self.tensors or {}
        if any(empty(value) for value in inputs if id(value) not in names):
            return gm.forward  # a batch of no rows: there is nothing to gain
        graph = capture(gm, inputs, names, None if model is None else module_ids(model))
        own = tuple(held(gm).values())
        everything = (*inputs, *own)
        real = [hint(value) for value in everything] if all_real(everything) else None
        fixed = static_inputs([n for n in gm.graph.nodes if n.op == "placeholder"], inputs, names)
        fixed = (*fixed, *range(len(inputs), len(everything)))
        watch = self.watch() if self.watch else None
        bare = None if watch is None else twin(graph)
        made = self._lower(graph, self.plan, f"graph{len(self.records)}", fixed, real)
        made.record.seconds = time.perf_counter() - start
        self.records.append(made.record)
        if watch is None or bare is None:
            return watched(made.function, gm, everything, made.frozen)
        kept = Kept(bare, own, fixed, Served(made.function))
        self._serve(kept, made, watch)
        self.kept.append(kept)
        self.made.append(made)
        if self.monitor is not None:
            self.monitor.attach(kept)
        return kept.served.call()

    def _lower(
        self, graph: fx.GraphModule, plan: Plan, name: str, fixed: Sequence[int], real: Sequence[Any] | None = None
    ) -> Made:
        """A canonical graph through the passes and the backend. real: values of its placeholders, to compare results by."""
        context = Context(name, Settings.from_env(), plan, self.backend, self.names)
        start = time.perf_counter()
        graph = run_pipeline(graph, ORDER, context, real)
        sites = [name for name in plan.decisions if name in context.sites]
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        frozen = tuple(i for i, n in enumerate(placeholders) if "value" in n.meta and not n.users)
        folded = tuple(placeholders[i].meta["value"] for i in frozen)
        share_constants(graph)
        function = self.backend.finish(graph)
        if self.mode == "reduce-overhead":
            function = replayed(function, graph, fixed)
        log, seconds = context.log, time.perf_counter() - start
        told = (log.hits, log.near(), context.kept, context.widened, source_lines(context.sites))
        return Made(function, Record(name, context.steps, sites, seconds, *told), frozen, folded)

    def _serve(self, kept: Kept, made: Made, watch: Watch) -> None:
        """Lets a graph run as it was lowered; what is folded into it is watched from now on."""
        for tensor in made.folded:
            watch.fold(tensor)
        function, own = made.function, kept.own
        kept.served.function = (lambda *given: function(*given, *own)) if own else function

    def again(self, plan: Plan, first: int = 0) -> list[Made]:
        """Every captured graph from `first` on, lowered anew by another plan; nothing runs differently yet."""
        several = enumerate(self.kept[first:], first)
        return [self._lower(twin(kept.graph), plan, f"graph{i}", kept.fixed) for i, kept in several]

    def exchange(self, plan: Plan, made: Sequence[Made]) -> None:
        """From their next call on, the graphs run as `again(plan)` has lowered them, and what is captured later does too."""
        watch = self.watch() if self.watch else None
        assert watch is not None
        for kept, one in zip(self.kept, made, strict=True):
            self._serve(kept, one, watch)
        self.plan, self.made, self.records = plan, list(made), [one.record for one in made]


_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, plan: Plan, backend: Backend, mode: str = "default") -> Runtime:
    """Makes a model with packed weights run compiled from now on; its class and methods stay as they are."""
    if mode != MODES[0]:
        check_one_width(plan, f"mode={mode!r} replays what it recorded, at the bits of then; leave the mode out")
    watch = Watch.of(model)
    runtime = Runtime(plan, backend, weakref.ref(model), mode=mode, watch=weakref.ref(watch))
    installed(model, runtime, watch)
    model.__dict__["__deepcopy__"] = types.MethodType(_deepcopy, model)  # copy.deepcopy looks here before anywhere
    _RUNTIMES[model] = runtime
    return runtime


@contextlib.contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Where what follows fails or is interrupted, the model is as before: its parameters, classes and way to be called."""
    before = [(module, dict(module._parameters)) for module in model.modules()]
    floats = dict(model.named_parameters(remove_duplicate=False))
    try:
        yield
    except BaseException:
        uninstall(model, floats)
        for module, parameters in before:
            module._parameters.clear()
            module._parameters.update(parameters)
        removed(model)
        for name in OURS:
            vars(model).pop(name, None)
        _RUNTIMES.pop(model, None)
        raise


def _deepcopy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy that is compiled too: a module by itself would drop its compiled call when it is copied."""
    runtime = _RUNTIMES[model]
    hook = model.__dict__.pop("__deepcopy__")
    try:
        twin = copy.deepcopy(model, memo)
    finally:
        model.__dict__["__deepcopy__"] = hook
    attach(twin, runtime.plan, runtime.backend, runtime.mode)
    return twin


def run_float(model: nn.Module) -> None:
    """Makes a model run in float through torch.compile's own compiler."""
    removed(model)
    model.__dict__.pop("__deepcopy__", None)
    model.compile(dynamic=None)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime of a model that qpass has compiled, or None."""
    return _RUNTIMES.get(model)
