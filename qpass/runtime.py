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
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.backends import Backend
from qpass.backends.cuda_graphs import MODES, replayed, static_inputs
from qpass.capture import capture, front_end, held, tensor_names
from qpass.checks import check_one_width
from qpass.install import uninstall
from qpass.passes import ORDER
from qpass.pipeline import Context, Settings, run_pipeline
from qpass.plan import Plan
from qpass.rewrite import Miss
from qpass.shared import share_constants
from qpass.sites import SiteNames
from qpass.source_lines import SourceLine, source_lines
from qpass.watch import OURS, Watch

CHANGED = (
    "a weight of this compiled model was replaced or written to after qpass.compile: it runs uncompiled from now on; "
    "compile it again for speed"
)
TRAINING = (
    "this model was compiled for inference and is in training mode: dropout is active and no gradient is computed; "
    "call .eval(), or train the float model"
)


@dataclass
class Record:
    """One captured graph of a compiled model: what each pass left, as text, the sites in it, and their lines of source."""

    name: str
    steps: list[Any]
    sites: list[str]
    seconds: float = 0.0
    hits: list[tuple[str, str]] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    kept: list[tuple[str, str]] = field(default_factory=list)
    widened: list[str] = field(default_factory=list)
    sources: dict[str, SourceLine] = field(default_factory=dict)


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

    def __call__(self, gm: fx.GraphModule, inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
        """One captured graph -> what runs in its place."""
        with self.lock:
            return self._build(gm, inputs)

    def _build(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        start = time.perf_counter()
        model = self.model() if self.model else None
        names = tensor_names(model) if model is not None else self.tensors or {}
        if any(_empty(value) for value in inputs if id(value) not in names):
            return gm.forward  # a batch of no rows: there is nothing to gain
        graph = capture(gm, inputs, names)
        context = Context(
            graph_name=f"graph{len(self.records)}",
            settings=Settings.from_env(),
            plan=self.plan,
            backend=self.backend,
            names=self.names,
        )
        everything = (*inputs, *held(gm).values())
        real = [_hint(value) for value in everything] if all_real(everything) else None
        graph = run_pipeline(graph, ORDER, context, real)
        sites = [name for name in self.plan.decisions if name in context.sites]
        placeholders = [n for n in graph.graph.nodes if n.op == "placeholder"]
        frozen = tuple(i for i, n in enumerate(placeholders) if "value" in n.meta and not n.users)
        share_constants(graph)
        function = self.backend.finish(graph)
        if self.mode == "reduce-overhead":
            fixed = static_inputs([n for n in gm.graph.nodes if n.op == "placeholder"], inputs, names)
            function = replayed(function, graph, [*fixed, *range(len(inputs), len(everything))])
        run = self._watched(function, gm, everything, frozen)
        seconds = time.perf_counter() - start
        log = context.log
        told = (log.hits, log.near(), context.kept, context.widened, source_lines(context.sites))
        self.records.append(Record(context.graph_name, context.steps, sites, seconds, *told))
        return run

    def _watched(
        self, function: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any], frozen: tuple[int, ...]
    ):
        """`function`, given the tensors that the graph holds; what is folded into it is watched from now on."""
        watch = self.watch() if self.watch else None
        if watch is None:
            return watched(function, gm, inputs, frozen)
        for i in frozen:
            watch.fold(inputs[i])
        own = tuple(held(gm).values())
        return (lambda *given: function(*given, *own)) if own else function


def all_real(inputs: Sequence[Any]) -> bool:
    """Whether the tensors of a capture hold values (the front end's own export does not)."""
    from torch._subclasses import FakeTensor

    return not any(isinstance(value, FakeTensor) for value in inputs)


def _empty(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == 0


def _hint(value: Any) -> Any:
    """The size a symbolic size has in the example."""
    return value.node.hint if isinstance(value, torch.SymInt) else value


def watched(function: Callable[..., Any], gm: fx.GraphModule, inputs: Sequence[Any], frozen: tuple[int, ...]):
    """`function`, or the captured graph in eager mode from the moment a tensor folded into it has changed.

    inputs: the graph's, then the tensors it holds itself; the result takes the first of these alone.
    """
    own = tuple(held(gm).values())
    watch = tuple((i, inputs[i], inputs[i]._version) for i in frozen if isinstance(inputs[i], Tensor))
    warned: list[str] = []

    def run(*given: Any) -> Any:
        args = given + own
        for i, tensor, version in watch:
            if args[i] is not tensor or tensor._version != version:
                break
        else:
            return function(*args)
        if not warned:
            warned.append(CHANGED)
            warnings.warn(CHANGED, stacklevel=2)
        return gm(*given)

    return run


_RUNTIMES: weakref.WeakKeyDictionary[nn.Module, Runtime] = weakref.WeakKeyDictionary()


def attach(model: nn.Module, plan: Plan, backend: Backend, mode: str = "default") -> Runtime:
    """Makes a model with packed weights run compiled from now on; its class and methods stay as they are."""
    if mode != MODES[0]:
        check_one_width(plan, f"mode={mode!r} replays what it recorded, at the bits of then; leave the mode out")
    watch = Watch.of(model)
    runtime = Runtime(plan, backend, weakref.ref(model), mode=mode, watch=weakref.ref(watch))
    model._compiled_call_impl = inference(model, runtime, watch)
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
        for name in OURS:
            vars(model).pop(name, None)
        _RUNTIMES.pop(model, None)
        raise


def inference(model: nn.Module, runtime: Runtime, watch: Watch) -> Callable[..., Any]:
    """The model's compiled call. It warns the first time that the model is in training mode, or is not what it was."""
    warned: list[str] = []
    calls = [front_end(model, runtime, frozen=True)]

    def warn(sentence: str) -> None:
        if sentence not in warned:
            warned.append(sentence)
            warnings.warn(sentence, stacklevel=4)

    def run(*args: Any, **kwargs: Any) -> Any:
        if model.training:
            warn(TRAINING)
        if watch.changed():
            warn(CHANGED)
            with torch.no_grad():
                return model._call_impl(*args, **kwargs)
        if len(calls) == 1 and watch.moved():  # what the model itself changes has to be guarded or passed
            calls.append(front_end(model, runtime))
        return calls[-1](*args, **kwargs)

    return run


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
    model._compiled_call_impl = None
    model.__dict__.pop("__deepcopy__", None)
    model.compile(dynamic=None)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime of a model that qpass has compiled, or None."""
    return _RUNTIMES.get(model)
