"""Where a call breaks off inside of the model, what is captured by itself is known by its path, and runs with its weights."""

import pytest
import torch
from torch import nn

import qpass
from qpass.frames import from_model, module_ids
from tests.models import batches, relative


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(self.up(x).relu())


class Encoder(nn.Module):
    """Its own forward runs in Python, and each of its blocks is captured alone."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        for p in self.blocks[0].parameters():
            p.data *= 2

    @torch._dynamo.disable(recursive=False)
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Broken(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.encoder, self.head = nn.Linear(32, 32), Encoder(), nn.Linear(32, 8)

    def forward(self, x):
        return self.head(self.encoder(self.first(x)))


LINEARS = {n for n, m in Broken().named_modules() if isinstance(m, nn.Linear)}


def quantized(plan):
    return {d.site.rpartition(":")[0] for d in plan.quantized}


def test_calibrated_sites_have_the_names_of_the_model():
    plan = qpass.analyze(Broken().eval(), "w8a8", *_data())
    assert quantized(plan) == LINEARS
    assert {d.site for d in plan} == {d.site for d in qpass.analyze(Broken().eval(), "w8a16")}


def test_a_recipe_finds_them():
    plan = qpass.analyze(Broken().eval(), "w8a8", *_data(), recipe={"encoder.blocks.1.*": None})
    assert quantized(plan) == {n for n in LINEARS if not n.startswith("encoder.blocks.1")}


def test_each_block_is_observed_by_itself():
    found = {d.site.rpartition(":")[0]: d for d in qpass.analyze(Broken().eval(), "w8a8", *_data())}
    first, second = (float(found[f"encoder.blocks.{i}.down"].hi) for i in range(2))
    assert first > 1.3 * second


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", ["w8a16", "w8a8-dynamic"])
@pytest.mark.parametrize("kept", ["encoder.*", "encoder.blocks.0.*", "encoder.blocks.?.up", "nothing"])
def test_blocks_left_in_float_run_with_their_own_weights(kept, scheme, backend):
    torch._dynamo.reset()
    x, _ = _data()
    recipe = None if kept == "nothing" else {kept: None}
    q = qpass.compile(Broken().eval(), scheme, x, recipe=recipe, backend=backend)
    with torch.no_grad():
        wanted = Broken().eval()(x)
        assert all(relative(q(x), wanted) < 0.02 for _ in range(3))


def test_the_spelling_of_torch_compile(recwarn):
    """Two models of one class too: neither runs with the weights of the other."""
    torch._dynamo.reset()
    x, _ = _data()
    models = [Broken().eval(), Broken().eval()]
    for p in models[1].parameters():
        p.data *= 1.5
    found = [torch.compile(m, backend="qpass", options={"scheme": "w8a16", "backend": "reference"}) for m in models]
    with torch.no_grad():
        for _ in range(2):
            assert all(relative(q(x), m(x)) < 0.02 for q, m in zip(found, models, strict=True))
    assert not [w for w in recwarn if "replaced or written to" in str(w.message)]


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16"])
def test_every_graph_is_quantized(scheme):
    """A plan made without a call, from the modules' own names, is found by the graphs of parts."""
    torch._dynamo.reset()
    data = _data()
    q = qpass.compile(Broken().eval(), scheme, *(data if scheme == "w8a8" else ()), backend="reference")
    with torch.no_grad():
        assert relative(q(data[0]), Broken().eval()(data[0])) < 0.02
    found = [site for i in range(len(qpass.inspect(q).records)) for site in qpass.inspect(q).record(i).sites]
    assert {site.rpartition(":")[0] for site in found} == LINEARS


def test_they_train():
    torch._dynamo.reset()
    data = _data()
    t = qpass.prepare_qat(Broken().eval(), "w4a8", *data)
    assert {n.rpartition(".")[0] for n, _ in t.named_modules() if n.endswith("weight_quantizer")} == LINEARS
    with torch.no_grad():
        wanted = t.eval()(data[0])
        found = qpass.compile(t, backend="reference")(data[0])
    assert relative(found, wanted) < 1e-5


def _data():
    torch.manual_seed(1)
    held = batches(shape=(4, 6, 32))
    return held[0], held


def graph(*stacks):
    """A graph of one call for each stack, {key: raw path}."""
    made = torch.fx.Graph()
    x = made.placeholder("x")
    for stack in stacks:
        node = made.call_function(torch.ops.aten.relu.default, (x,))
        if stack:
            node.meta["nn_module_stack"] = {key: (raw, nn.Module) for key, raw in stack.items()}
    return torch.fx.GraphModule(nn.Module(), made)


def paths(gm):
    stacks = [node.meta.get("nn_module_stack", {}) for node in gm.graph.nodes if node.op == "call_function"]
    return [[raw for raw, _ in stack.values()] for stack in stacks]


def test_a_graph_of_the_whole_model_stays_as_it_is():
    model = Broken()
    key = str(id(model.encoder.blocks[0]))
    gm = graph({key: "L['self'].encoder.blocks.0"}, {})
    from_model(gm, module_ids(model))
    assert paths(gm) == [["L['self'].encoder.blocks.0"], []]


def test_what_stands_in_the_root_of_a_part_is_named_after_the_part():
    model = Broken()
    key = str(id(model.encoder.blocks[0].up))
    gm = graph({}, {key: "L['self'].up", f"{key}@1": "L['self'].up"})
    from_model(gm, module_ids(model))
    assert paths(gm) == [["L['self'].encoder.blocks.0"], ["L['self'].encoder.blocks.0.up"] * 2]


def test_a_module_of_several_names_keeps_the_one_it_was_found_by():
    model = nn.ModuleDict({"inner": nn.ModuleDict({"shared": nn.Linear(4, 4)})})
    model["shared"] = model["inner"]["shared"]
    key = str(id(model["shared"]))
    gm = graph({key: "L['self'].shared"})
    from_model(gm, module_ids(model))
    assert paths(gm) == [["L['self'].shared"]]


def test_a_module_of_another_model_stays_as_it_is():
    gm = graph({str(id(nn.Linear(1, 1))): "L['self'].up"}, {"L__self___up": "L['self'].up"})
    from_model(gm, module_ids(Broken()))
    assert paths(gm) == [["L['self'].up"], ["L['self'].up"]]
