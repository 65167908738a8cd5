"""mode="reduce-overhead" without a GPU: what is recorded, what is not and says why, and how results would be replayed."""

import copy
import logging

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

import qpass
from qpass.backends import cuda_graphs
from qpass.backends.cuda_graphs import replayed, static_inputs
from qpass.errors import QpassError
from qpass.runtime import runtime_of

WRITE = torch.ops.aten.add_.Tensor


def graph_on(device, written=None):
    """x, cache -> (x + cache,), with fake tensors of a device; `written`: the name of an input that is added to."""
    with FakeTensorMode():
        value = torch.empty(4, 8, device=device)
    graph = fx.Graph()
    nodes = {name: graph.placeholder(name) for name in ("x", "cache")}
    made = [*nodes.values()]
    if written:
        made.append(graph.call_function(WRITE, (nodes[written], 1.0)))
    made.append(graph.call_function(torch.ops.aten.add.Tensor, tuple(nodes.values())))
    graph.output((made[-1],))
    for node in made:
        node.meta["val"] = value if node.op == "placeholder" or node.target is not WRITE else node.args[0].meta["val"]
    for node in nodes.values():  # each its own memory
        with FakeTensorMode():
            node.meta["val"] = torch.empty(4, 8, device=device)
    if written:
        made[2].meta["val"] = nodes[written].meta["val"]
    return fx.GraphModule(nn.Module(), graph)


@pytest.fixture
def recorder(monkeypatch):
    """Stands in for torch's recorder: keeps what it was given, runs the function."""
    seen = []

    def cudagraphify_impl(model, inputs, static_input_idxs, **options):
        seen.append((inputs, list(static_input_idxs), options))
        return model

    monkeypatch.setattr("torch._inductor.cudagraph_trees.cudagraphify_impl", cudagraphify_impl)
    return seen


def test_recorded_once(recorder):
    run = replayed(lambda x, cache: (x + cache,), graph_on("cuda:0"), [1])
    assert not recorder, "recorded at the first call, with real sizes"
    x, cache = torch.randn(4, 8), torch.randn(4, 8)
    for _ in range(3):
        (y,) = run(x, cache)
        assert torch.equal(y, x + cache)
    ((inputs, static, options),) = recorder
    assert inputs[0] is x
    assert static == [1]
    assert options["device_index"] == 0
    assert options["is_inference"]
    assert len(options["stack_traces"]) == 1
    assert len(options["placeholders"]) == 2
    assert options["mutated_input_idxs"] == ()


def test_a_cache_that_stays_where_it_is_may_be_written(recorder):
    replayed(lambda x, cache: (x,), graph_on("cuda:0", "cache"), [1])(torch.ones(1), torch.ones(1))
    assert recorder[0][2]["mutated_input_idxs"] == (1,)


@pytest.mark.parametrize(
    ("device", "written", "why"),
    [
        ("cuda:0", "x", "it writes to x; torch._dynamo.mark_static_address"),
        ("cpu", None, "it works on no CUDA device"),
    ],
)
def test_not_recorded(device, written, why, caplog):
    function = lambda x, cache: (x,)
    with caplog.at_level(logging.WARNING, "qpass"):
        assert replayed(function, graph_on(device, written), [1]) is function
    assert why in caplog.text


def test_a_torch_of_another_shape(monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.cudagraph_utils.get_placeholder_info", None)
    function = lambda x, cache: (x,)
    assert replayed(function, graph_on("cuda:0"), []) is function
    assert "this torch cannot record it: TypeError" in caplog.text


def test_static_inputs():
    graph = fx.Graph()
    nodes = [graph.placeholder(name) for name in ("size", "x", "weight", "cache")]
    nodes[3].meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    values = [3, *(torch.ones(1) for _ in range(3))]
    assert static_inputs(nodes, values, {id(values[2]): "weight"}) == [2, 3]


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x, cache):
        cache.add_(x)
        return self.fc(x) + cache


def test_the_caches_of_a_model_are_static(monkeypatch):
    """As transformers marks those of generate(); the model's own tensors are static anyway."""
    seen = []
    monkeypatch.setattr("qpass.runtime.replayed", lambda function, gm, static: seen.append((gm, static)) or function)
    model, x, cache = Cached().eval(), torch.randn(4, 64), torch.zeros(4, 64)
    torch._dynamo.mark_static_address(cache)
    compiled = qpass.compile(
        model, "w8a8-dynamic", example_inputs=(x, cache), mode="reduce-overhead", backend="reference"
    )
    expected = compiled(x, cache)
    assert torch.isfinite(expected).all()
    gm, static = seen[0]
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    moving = [n for i, n in enumerate(placeholders) if i not in static and isinstance(n.meta["val"], torch.Tensor)]
    assert len(moving) == 1, "x alone is copied"
    assert runtime_of(copy.deepcopy(compiled)).mode == "reduce-overhead"


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x):
        return self.second(self.first(x).relu())


@pytest.mark.parametrize("spell", ["mode", "option"])
def test_torch_compile(spell, monkeypatch):
    seen = []
    monkeypatch.setattr("qpass.runtime.replayed", lambda function, gm, static: seen.append(static) or function)
    model, x = Two().eval(), torch.randn(4, 64)
    asked = {"mode": "reduce-overhead"} if spell == "mode" else {"options": {"mode": "reduce-overhead"}}
    model.compile(backend="qpass", **asked)
    with torch.no_grad():
        model(x)
    assert len(seen) == 1
    assert len(seen[0]) == 4, "weights and biases"


def test_on_cpu_it_says_so(caplog):
    model, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(4, 64)
    plain = qpass.compile(model, "w8a8-dynamic", example_inputs=x)(x)
    with caplog.at_level(logging.WARNING, "qpass"):
        found = qpass.compile(model, "w8a8-dynamic", example_inputs=x, mode="reduce-overhead")(x)
    assert torch.equal(found, plain)
    assert "'reduce-overhead' has no effect" in caplog.text


@pytest.mark.parametrize("call", ["compile", "torch", "load"])
def test_bad_mode(call, tmp_path):
    model, x = Two().eval(), torch.randn(4, 64)
    if call == "compile":
        run = lambda: qpass.compile(model, "w8a8-dynamic", example_inputs=x, mode="reduce_overhead")
    elif call == "load":
        qpass.save(qpass.compile(model, "w8a8-dynamic", example_inputs=x), tmp_path / "m")
        run = lambda: qpass.load(tmp_path / "m", model, mode="reduce_overhead")
    else:
        model.compile(backend="qpass", options={"mode": "reduce_overhead"})
        run = lambda: model(x)
    with pytest.raises(
        (QpassError, torch._dynamo.exc.BackendCompilerFailed), match="is not one of default, reduce-over"
    ):
        run()


def test_modes_are_what_torch_calls_them():
    assert set(cuda_graphs.MODES) <= {*torch._inductor.list_mode_options(), "default"}
