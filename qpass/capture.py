"""From a module to graphs: torch.compile's front end, then one re-trace into canonical form.

    nn.Module --front end--> torch.fx graph of Python calls --retrace--> pre-dispatch ATen (aten.linear, ...)

What the front end cannot put into a graph (a branch on data, a call into C) it runs as Python between graphs, so a
model that torch.compile can run is a model that can be captured. Parameters and buffers are placeholders that carry
`meta["fqn"]`, their path in the model, and `meta["value"]`, the tensor itself. Where the front end leaves them on the
graph's module (inductor's `freezing` setting makes it), they are lifted: the graph's last inputs, in `held` order.
"""

from __future__ import annotations

import contextlib
import threading
import types
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from qpass.canonical import canonicalize
from qpass.errors import QpassError
from qpass.frames import from_model
from qpass.guards import needed

# of one model: batch 1, a prompt or one token, each kind of cache and mask has one; torch would stop at 8, in eager mode
GRAPHS = 64
GraphBackend = Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Identity of each parameter and buffer of a model -> its path; a tied one is named by its first path."""
    names: dict[int, str] = {}
    for named in (model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)):
        for name, tensor in named:
            names.setdefault(id(tensor), name)
    return names


def front_end(model: nn.Module, backend: GraphBackend, frozen: bool = False, path: str = "") -> Callable[..., Any]:
    """The call of a model, or of its part at `path`, captured: each graph goes to `backend(graph, inputs)`, whose result
    runs in its place.

    Batch and length are symbolic from the first capture on, height and width from the second size on. The outer
    function lives here, since the front end skips frames of torch.nn (a bare Sequential); it is a new code object for
    each model, since captures are counted by it.

    frozen: parameters and buffers are held by the graph (see `held`) instead of being looked up and passed on each call,
    and fewer guards are kept; somebody else has to notice when they are replaced.
    """
    names = path.split(".") if path else ()

    def call(root: nn.Module, *args: Any, **kwargs: Any) -> Any:
        for name in names:
            root = root._modules[name]  # type: ignore[assignment]
        return root._call_impl(*args, **kwargs)

    slow = _no_fast_path if any(isinstance(m, WITH_FAST_PATH) for m in model.modules()) else contextlib.nullcontext
    code = call.__code__.replace(co_name="forward")
    own = types.FunctionType(code, call.__globals__, "forward", None, call.__closure__)
    held = _Held(backend)
    options = {"guard_filter_fn": lambda guards: [needed(guard) for guard in guards]} if frozen else None
    compiled = torch.compile(own, backend=_relay(weakref.ref(held)), dynamic=True, options=options)
    # a float that arrives as a tensor cannot be retraced; a recurrent layer is one operation of the graph, not a break
    changes = dict(specialize_float=True, allow_rnn=True, prepare_freezing=frozen, recompile_limit=GRAPHS)
    # a cached result costs more than a new one where sizes are symbols: its strides are checked in Python, of views twice
    changes["fake_tensor_cache_enabled"] = False
    settings = torch._dynamo.config.patch(changes)
    # a batch as long as its sequences is a coincidence
    apart = torch.fx.experimental._config.patch(use_duck_shape=False)

    images = Images() if any(isinstance(m, nn.Conv2d | nn.Conv3d) for m in model.modules()) else None

    def run(*args: Any, **kwargs: Any) -> Any:
        if images is not None:
            images.mark((*args, *kwargs.values()))
        try:
            with settings, apart, slow(), torch.no_grad():
                return compiled(model, *args, **kwargs)
        except torch._dynamo.exc.BackendCompilerFailed as error:
            if isinstance(error.inner_exception, QpassError):  # our own sentence, without the front end's around it
                raise error.inner_exception from None
            raise

    run.held = held  # type: ignore[attr-defined]
    return run


def held(gm: fx.GraphModule) -> dict[str, Tensor]:
    """Tensors that a graph of the front end holds itself, by name; a tied one once. Usually none."""
    return dict(gm.named_parameters()) | dict(gm.named_buffers())


@dataclass(eq=False)
class _Held:
    """Keeps a backend alive for as long as the call it belongs to."""

    backend: GraphBackend


def _relay(held: weakref.ref[_Held]) -> GraphBackend:
    """The backend as the front end may see it: it keeps a list of all it ever saw, and with them models and weights."""

    def relay(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        owner = held()
        assert owner is not None
        return owner.backend(gm, inputs)

    return relay


class Images:
    """Tells the front end that height and width of images are constants, until an image of another size comes.

    Windows and patches of symbolic sizes take minutes to reason about (Swin), and most models see one size. A batch of
    a size not seen before may be captured anew (torch gives batch 1 a graph of its own), so each is told once.
    """

    def __init__(self) -> None:
        self.size: torch.Size | None = None  # height and width of the first image
        self.told: set[torch.Size] = set()

    def mark(self, values: Sequence[Any]) -> None:
        """Marks the images among the arguments of a call."""
        for value in values:
            if not isinstance(value, Tensor) or value.dim() not in (4, 5) or value.shape in self.told:
                continue
            if value.is_floating_point():
                self.size = self.size or value.shape[2:]
                self.told.add(value.shape)
                if value.shape[2:] == self.size:
                    torch._dynamo.mark_static(value, list(range(2, value.dim())))


# in eval mode torch runs these whole, as one operator that hides its linears
WITH_FAST_PATH = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)
_FAST_PATH: dict[str, Any] = {"lock": threading.Lock(), "calls": 0, "before": True}


@contextlib.contextmanager
def _no_fast_path() -> Iterator[None]:
    """Turns torch's fast path of attention off for the calls inside, on any number of threads, and on again after."""
    state = _FAST_PATH
    with state["lock"]:
        if not state["calls"]:
            state["before"] = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        state["calls"] += 1
    try:
        yield
    finally:
        with state["lock"]:
            state["calls"] -= 1
            if not state["calls"]:
                torch.backends.mha.set_fastpath_enabled(state["before"])


def capture(
    gm: fx.GraphModule, inputs: Sequence[Any], names: Mapping[int, str], modules: Mapping[str, int] | None = None
) -> fx.GraphModule:
    """A graph as the front end hands it over -> the same graph in canonical form.

    `inputs` are what the front end gives its backend: tensors and symbolic sizes, in the order of the placeholders. The
    result takes these, then what `held(gm)` gives. modules: `module_ids` of the model, if there is one.
    """
    graph = retrace(gm, inputs)
    if modules:
        from_model(graph, modules)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, value in zip(placeholders, (*inputs, *held(gm).values()), strict=True):
        if isinstance(value, Tensor) and id(value) in names:
            node.meta["fqn"], node.meta["value"] = names[id(value)], value
    return canonicalize(graph)


class _Interpreted(nn.Module):
    """Runs a graph node by node, so that each operation recorded on the way carries the node's meta."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, *args: Any) -> Any:
        return fx.Interpreter(self.graph).run(*args)


def retrace(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """Runs a graph on fake tensors and records the ATen operators it reaches before dispatch; sizes stay symbolic.

    Inside torch.func transforms (vmap, grad) those operators are seen after dispatch alone: linear comes as t and addmm.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    context = torch._guards.TracingContext.try_get()
    mode = context.fake_mode if context else None
    if mode is None:
        mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    symbolic = context.tensor_to_context if context else {}
    lifted = held(gm)
    module = _Interpreted(gm)

    def fake(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        known = symbolic.get(value)
        source = known.tensor_source if known is not None else None  # with it, sizes and strides keep their symbols
        return mode.from_tensor(value, symbolic_context=known, static_shapes=known is None, source=source)

    def run(*args: Any) -> Any:
        own = {f"graph.{name}": value for name, value in zip(lifted, args[len(inputs) :], strict=True)}
        return torch.func.functional_call(module, own, args[: len(inputs)])

    fakes = [*map(fake, inputs), *(mode.from_tensor(value, static_shapes=True) for value in lifted.values())]
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        stack.enter_context(torch.fx.traceback.preserve_node_meta())
        stack.enter_context(torch.no_grad())
        return make_fx(run, pre_dispatch=not _transformed(gm))(*fakes)


def _transformed(gm: fx.GraphModule) -> bool:
    """Whether a graph, or one inside it, enters a torch.func transform."""
    return any(
        getattr(node.target, "__module__", None) == "torch._functorch.predispatch"
        for part in gm.modules()
        if isinstance(part, fx.GraphModule)
        for node in part.graph.nodes
    )
