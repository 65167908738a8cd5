"""Rows of one parameter that products read as matrices of their own: each has integers, steps and a decision by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qpass
from qpass.install import packed_weights
from qpass.slices import overlapping, slice_name, slice_of, tensor_of
from tests.graphs import captured, named
from tests.models import relative

aten = torch.ops.aten
WIDTH, HEADS = 32, 4
SCHEMES = ("w8a8", "w8a8-dynamic", "w8a16", "w4a8-g16", "w4a16-g16")


class Cross(nn.Module):
    """Attention between two sequences, and one whose values are another's (as in DETR): three matrices in one parameter."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.cross, self.mixed = (nn.MultiheadAttention(WIDTH, HEADS, batch_first=True) for _ in range(2))
        for bias in (self.cross.in_proj_bias, self.mixed.in_proj_bias):
            nn.init.normal_(bias)

    def forward(self, x, y, z):
        return self.cross(x, y, y, need_weights=False)[0] + self.mixed(x, y, z, need_weights=False)[0]


class Rows(nn.Module):
    """One parameter, read by functions of its rows."""

    def __init__(self, product):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(torch.randn(48, WIDTH) / 5), nn.Parameter(torch.randn(48))
        self.product = product

    def forward(self, x):
        return self.product(x, self.w, self.b)


def inputs(count=3):
    return [tuple(torch.randn(2, length, WIDTH) for length in (5, 7, 7)) for _ in range(count)]


def both(a, b):
    return torch.cat([a, b], -1)


SPELLINGS = {
    "slice": (lambda x, w, b: F.linear(x, w[16:40], b[16:40]), ["16:40"]),
    "head and tail": (lambda x, w, b: both(F.linear(x, w[:16]), F.linear(x, w[-16:])), ["0:16", "32:48"]),
    "split": (
        lambda x, w, b: both(*(F.linear(x, *p) for p in zip(w.split([8, 40]), b.split([8, 40]), strict=True))),
        ["0:8", "8:48"],
    ),
    "even split": (lambda x, w, b: both(*(F.linear(x, p) for p in w.split(24))), ["0:24", "24:48"]),
    "chunk": (lambda x, w, b: both(*(F.linear(x, p) for p in w.chunk(2))), ["0:24", "24:48"]),
    "narrow": (lambda x, w, b: F.linear(x, w.narrow(0, 8, 16)), ["8:24"]),
    "matmul": (lambda x, w, b: x @ w[8:24].t(), ["8:24"]),
    "addmm": (lambda x, w, b: torch.addmm(b[8:24], x.flatten(0, 1), w[8:24].t()), ["8:24"]),
    "transposed": (lambda x, w, b: x @ w[:32], ["0:32"]),
    "all of it": (lambda x, w, b: F.linear(x, w[:], b[0:48]), [None]),
}


@pytest.mark.parametrize(("name", "backend"), [*((name, "reference") for name in SPELLINGS), ("split", "cpu")])
def test_spellings(name, backend):
    product, rows = SPELLINGS[name]
    model, x = Rows(product).eval(), torch.randn(3, 4, WIDTH)
    q = qpass.compile(model, "w8a16", x, backend=backend, guard=False)
    assert list(qpass.inspect(q).plan.packed) == [f"w[{r}]" if r else "w" for r in rows]
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.02


@pytest.mark.parametrize(
    ("scheme", "backend"), [*((scheme, "reference") for scheme in SCHEMES), ("w8a8", "cpu"), ("w4a16-g16", "cpu")]
)
def test_attention_between_sequences(scheme, backend):
    model, data = Cross().eval(), inputs()
    static = scheme in ("w8a8", "w4a8-g16")
    q = qpass.compile(model, scheme, data[0], data if static else None, backend=backend, guard=False)
    sites = {d.site: d.weight for d in qpass.inspect(q).plan if d.quantized and d.operation == "linear"}
    assert sites == {
        "cross:linear.0": "cross.in_proj_weight[0:32]",
        "cross:linear.1": "cross.in_proj_weight[32:96]",
        "cross:linear.2": "cross.out_proj.weight",
        "mixed:linear.0": "mixed.in_proj_weight[0:32]",
        "mixed:linear.1": "mixed.in_proj_weight[32:64]",
        "mixed:linear.2": "mixed.in_proj_weight[64:96]",
        "mixed:linear.3": "mixed.out_proj.weight",
    }
    with torch.no_grad():
        assert relative(q(*data[0]), model(*data[0])) < (0.1 if scheme.startswith("w4") else 0.02)


def test_the_packed_model_runs_in_eager_mode_and_is_smaller():
    model, (x, *_) = Cross().eval(), inputs()
    q = qpass.compile(model, "w8a16", x, backend="reference")
    with torch.no_grad():
        compiled, q._compiled_call_impl = q(*x), None
        assert relative(q(*x), compiled) < 1e-5
    whole = sum(t.nbytes for t in model.state_dict().values())
    assert sum(t.nbytes for t in q.state_dict().values()) < 0.4 * whole


def test_slices_have_steps_and_types_of_their_own():
    model, data = Cross().eval(), inputs()
    recipe = {"cross:linear.0": "w4a8", "mixed:linear.1": None}
    plan = qpass.analyze(model, "w8a8", data[0], data, recipe)
    assert plan["cross:linear.0"].weight_type.bits == 4
    assert plan["cross:linear.1"].weight_type.bits == 8
    assert not torch.equal(plan["cross:linear.0"].input_scale, plan["cross:linear.1"].input_scale)
    assert plan["mixed:linear.1"].why == "the recipe leaves it in float"
    q = qpass.compile(model, plan=plan, backend="reference")
    assert torch.equal(q.mixed.in_proj_weight[32:64], model.mixed.in_proj_weight[32:64])
    assert list(packed_weights(q)) == [
        "cross.in_proj_weight[0:32]",
        "cross.in_proj_weight[32:96]",
        "cross.out_proj.weight",
        "mixed.in_proj_weight[0:32]",
        "mixed.in_proj_weight[64:96]",
        "mixed.out_proj.weight",
    ]


@pytest.mark.parametrize("recipe", [None, {"mixed:linear.1": None}, {"cross:linear.[01]": None}])
def test_saved_and_loaded(recipe, tmp_path):
    model, data = Cross().eval(), inputs()
    q = qpass.compile(model, "w8a8", data[0], data, recipe, backend="reference")
    qpass.save(q, tmp_path / "m.safetensors")
    fresh = Cross()
    for p in fresh.parameters():
        nn.init.zeros_(p)
    loaded = qpass.load(tmp_path / "m.safetensors", fresh.eval(), backend="reference")
    copied = copy.deepcopy(q)
    with torch.no_grad():
        wanted = q(*data[0])
        assert torch.equal(loaded(*data[0]), wanted)
        assert torch.equal(copied(*data[0]), wanted)


def test_a_plan_is_held_to_the_rows_it_was_made_from(tmp_path):
    model, data = Cross().eval(), inputs()
    qpass.analyze(model, "w8a8", data[0], data).save(tmp_path / "plan")
    plan = qpass.analyze(model, "w8a8", data[0], data).load(tmp_path / "plan")
    qpass.compile(model, plan=plan, backend="reference")
    model.cross.in_proj_weight.data[40] += 1
    with pytest.raises(qpass.QpassError, match=r"cross:linear\.1: .*cross\.in_proj_weight\[32:96\]"):
        qpass.compile(model, plan=plan, backend="reference")


def test_the_callers_model_stays_as_it_is():
    model, (x, *_) = Cross().eval(), inputs()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    qpass.compile(model, "w8a16", x, backend="reference")
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_both_spellings_of_torch_compile():
    model, (x, *_) = Cross().eval(), inputs()
    wanted = qpass.compile(model, "w8a16", x, backend="reference")
    model.compile(backend="qpass", options={"scheme": "w8a16", "backend": "reference"})
    with torch.no_grad():
        assert torch.equal(model(*x), wanted(*x))


def test_of_overlapping_rows_the_second_reader_says_why_it_is_float():
    def product(x, w, b):
        return both(F.linear(x, w[:32]), F.linear(x, w[16:]))

    model, x = Rows(product).eval(), torch.randn(3, 4, WIDTH)
    plan = qpass.analyze(nn.Sequential(model, nn.Linear(64, 8)).eval(), "w8a16", x)
    why = "0:linear.0 reads other rows of the same weight, and some of these too: one row has one set of integers"
    assert [d.why for d in plan] == ["", why, ""]


def test_a_parameter_that_is_read_whole_and_in_rows():
    """The first of the two is quantized, and the other reads what its integers stand for."""
    for first, second in ((lambda w: w, lambda w: w[:32]), (lambda w: w[:32], lambda w: w)):
        product = lambda x, w, b, f=first, g=second: both(F.linear(x, f(w)), F.linear(x, g(w)))
        model, x = Rows(product).eval(), torch.randn(3, 4, WIDTH)
        q = qpass.compile(model, "w8a16", x, backend="reference", guard=False)
        assert [d.quantized for d in qpass.inspect(q).plan] == [True, False]
        with torch.no_grad():
            assert relative(q(x), model(x)) < 0.02


def test_rows_that_are_read_twice_are_packed_once():
    model, x = Rows(lambda x, w, b: F.linear(x, w[:32]) + F.linear(x.relu(), w[:32])).eval(), torch.randn(3, 4, WIDTH)
    q = qpass.compile(model, "w8a16", x, backend="reference")
    assert list(packed_weights(q)) == ["w[0:32]"]
    with torch.no_grad():
        assert relative(q(x), model(x)) < 0.02


def test_one_width_alone():
    (x, *_) = inputs()
    plan = qpass.analyze(Cross().eval(), "w{8,4}a16", x)
    assert (
        plan["cross:linear.0"].why
        == "it reads rows of a parameter, and whole parameters alone are kept in several widths"
    )
    assert plan["cross:linear.2"].quantized


def test_a_decoder_of_torch():
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(WIDTH, HEADS, 64, batch_first=True)
    model = nn.TransformerDecoder(layer, 2).eval()
    x, memory = torch.randn(2, 5, WIDTH), torch.randn(2, 9, WIDTH)
    q = qpass.compile(model, "w8a8-dynamic", (x, memory), guard=False)
    assert qpass.inspect(q).plan.coverage()[0] > 0.95
    with torch.no_grad():
        assert relative(q(x, memory), model(x, memory)) < 0.03


def test_canonical_spelling():
    product, _ = SPELLINGS["split"]
    gm, _ = captured(Rows(product).eval(), torch.randn(3, 4, WIDTH))
    parts = named(gm, aten.slice.Tensor)
    assert [node.args[1:] for node in parts] == [(0, 0, 8, 1), (0, 8, 48, 1), (0, 0, 8, 1), (0, 8, 48, 1)]


def test_names():
    assert slice_name("a.w", (3, 9)) == "a.w[3:9]"
    assert slice_of("a.w[3:9]") == ("a.w", (3, 9))
    assert slice_of("a.w") == ("a.w", None)
    named_tensors = {"a.w": torch.arange(12.0)}
    assert tensor_of(named_tensors, "a.w[3:9]").tolist() == [3, 4, 5, 6, 7, 8]
    assert tensor_of(named_tensors, "a.w[3:13]") is None
    assert tensor_of(named_tensors, "b[0:1]") is None
    assert list(overlapping({"p": "w[0:4]", "q": "w[4:8]", "r": "v"})) == []
    assert list(overlapping({"p": "w[0:4]", "q": "w", "r": "v", "s": "v"})) == ["q"]
