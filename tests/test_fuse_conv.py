"""Every rule around integer convolutions: pattern and replacement compute the same; what does not fit is told."""

import inspect

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qpass.passes.fuse_conv import CONV, CONV_EPILOGUE
from qpass.rewrite import Match, Miss, RuleLog, apply, find
from tests.graphs import captured, frozen, named, run

aten = torch.ops.aten
Q = torch.ops.qpass
RULES = {each.name: each for each in (*CONV, *CONV_EPILOGUE)}


def arguments(names, sample=False):
    """Values for the parameters of the patterns: [2, 4, 7, 6] by [6, 2, 3, 3] in two groups."""
    params = (2, 1, 1, 1) if sample else ()
    zero = torch.tensor(7, dtype=torch.int32)
    values = {
        "x": torch.randint(0, 256, (2, 4, 7, 6), dtype=torch.uint8), "xs": torch.rand(params) / 50 + 0.01,
        "xz": torch.randint(0, 256, params, dtype=torch.int32), "xt": "u8/sample" if sample else "u8/t",
        "xd": torch.float32, "wd": torch.float32, "dtype": torch.float32, "to": torch.bfloat16, "wt": "i8/c0",
        "b": torch.randn(6),
        "w": torch.randint(-127, 128, (6, 2, 3, 3), dtype=torch.int8), "ws": torch.rand(6) / 50 + 0.001,
        "other": torch.randint(0, 256, (2, 6, 4, 6), dtype=torch.uint8), "ots": torch.tensor(0.05), "otz": zero,
        "ott": "u8/t", "act": "relu", "slope": None, "bound": torch.rand(6, 1, 1),
        "os": torch.tensor(0.3), "oz": zero, "ot": "u8/t",
        "stride": [2, 1], "padding": [1, 1], "dilation": [1, 1], "transposed": False, "more": [0, 0], "groups": 2,
    }  # fmt: skip
    short = {"s": "stride", "p": "padding", "d": "dilation", "t": "transposed", "o": "more", "g": "groups"}
    return {name: values[short.get(name, name)] for name in names}


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_replacement_computes_the_pattern(name, sample):
    each = RULES[name]
    given = arguments(inspect.signature(each.pattern).parameters, sample)
    if name == "conv_residual":
        given["other"] = torch.randn(2, 6, 4, 6)
    if name == "conv_prelu":
        given["slope"] = torch.rand(6)
    wanted, found = each.pattern(**given), each.replacement(**given)
    assert wanted.dtype == found.dtype
    assert wanted.shape == found.shape == (2, 6, 4, 6)
    if wanted.dtype is torch.uint8:
        assert int((wanted.int() - found.int()).abs().max()) <= 1
    torch.testing.assert_close(
        found.float(), wanted.float(), rtol=1e-5, atol=1 if wanted.dtype is torch.uint8 else 1e-4
    )


def test_every_activation_has_a_rule():
    from qpass.ops import ACTIVATIONS

    assert {f"conv_{name}" for name, _ in ACTIVATIONS if name} <= set(RULES)


class Layer(nn.Module):
    """A convolution of integers and what stands behind it: use(self, y, rest)."""

    def __init__(self, use, x_type="u8/t", weight_type="i8/c0", transposed=False):
        super().__init__()
        self.use, self.types, self.transposed = use, (x_type, weight_type), transposed
        self.register_buffer("w", torch.randint(-127, 128, (6, 6, 3, 3), dtype=torch.int8))
        self.register_buffer("s", torch.rand(6) / 1000)
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(100, dtype=torch.int32))
        self.register_buffer("slope", torch.rand(6))
        self.register_buffer("bound", torch.rand(6, 1, 1))
        self.register_buffer("scales", 0.01 + torch.rand(2, 1, 1, 1))
        self.register_buffer("zeros", torch.zeros(2, 1, 1, 1, dtype=torch.int32))

    def forward(self, q, *rest):
        x = Q.dequantize(q, self.scale, self.zero, self.types[0], torch.float32)
        w = Q.dequantize(self.w, self.s, None, self.types[1], torch.float32)
        convolution = F.conv_transpose2d if self.transposed else F.conv2d
        return self.use(self, convolution(x, w, None, 1, 1), *rest)


def codes(*shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8)


def real(m, q, qtype="u8/t"):
    return Q.dequantize(q, m.scale, m.zero, qtype, torch.float32)


def sweep(gm, log=None):
    apply(gm, CONV, log)
    while apply(gm, CONV_EPILOGUE, log):
        pass
    gm.recompile()


X, SAME = (2, 6, 5, 4), (2, 6, 5, 4)
WHOLE = {
    "alone": (lambda m, y: y, ()),
    "relu": (lambda m, y: torch.relu(y), ()),
    "in place": (lambda m, y: F.relu_(y), ()),
    "gelu": (lambda m, y: F.gelu(y), ()),
    "gelu by tanh": (lambda m, y: F.gelu(y, approximate="tanh"), ()),
    "hardswish": (lambda m, y: F.hardswish(y), ()),
    "prelu": (lambda m, y: F.prelu(y, m.slope), ()),
    "residual, relu": (lambda m, y, r: torch.relu(y + r), (torch.randn(SAME),)),
    "residual on the left": (lambda m, y, r: r + y, (torch.randn(SAME),)),
    "integer residual, codes": (
        lambda m, y, r: Q.quantize(torch.relu(real(m, r) + y), m.scale, m.zero, "u8/t"),
        (codes(*SAME),),
    ),
    "prelu, codes": (lambda m, y: Q.quantize(F.prelu(y, m.slope), m.scale, m.zero, "u8/t"), ()),
    "cap": (lambda m, y: torch.minimum(F.relu(y), m.bound), ()),
    "codes": (lambda m, y: Q.quantize(F.silu(y), m.scale, m.zero, "u8/t"), ()),
}


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", WHOLE)
def test_one_operator_is_left(name, transposed):
    use, rest = WHOLE[name]
    model = Layer(use, weight_type=f"i8/c{int(transposed)}", transposed=transposed)
    gm, values = frozen(*captured(model, codes(*X), *rest))
    wanted = run(gm, values)
    sweep(gm)
    calls = [n.target for n in gm.graph.nodes if n.op == "call_function"]
    assert calls == [Q.conv.default]
    found = run(gm, values)
    assert found.dtype == wanted.dtype
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1e-5, atol=1 if found.dtype is torch.uint8 else 1e-4)


# name -> (what stands behind, other inputs, the sentence)
PARTS = {
    "broadcast": (lambda m, y, r: y + r, (torch.randn(6, 1, 1),), "the residual is broadcast"),
    "broadcast over the batch": (lambda m, y, r: y + r, (torch.randn(1, 6, 5, 4),), "the residual is broadcast"),
    "a number": (lambda m, y: y + 1.5, (), "the residual is a number or of another dtype"),
    "another dtype": (
        lambda m, y, r: y + r,
        (torch.randn(SAME).double(),),
        "the residual is a number or of another dtype",
    ),
    "integers broadcast": (lambda m, y, r: y + real(m, r), (codes(2, 6, 1, 1),), "the residual is broadcast"),
    "read twice": (lambda m, y: (torch.relu(y), y), (), "has 2 users, a fused value must have one"),
    "chosen from the result": (
        lambda m, y: Q.quantize(y, *Q.choose_qparams(y, "u8/sample"), "u8/sample"),
        (),
        "has 2 users, a fused value must have one",
    ),
    "codes of samples": (
        lambda m, y: Q.quantize(y, m.scales, m.zeros, "u8/sample"),
        (),
        "a type of u8/sample is chosen from the whole result",
    ),
    "scale at run time": (
        lambda m, y, s: Q.quantize(y, s, m.zero, "u8/t"),
        (torch.tensor(0.1),),
        "its scale is chosen at run time",
    ),
}


@pytest.mark.parametrize("name", PARTS)
def test_what_does_not_fit_stays_and_is_told(name):
    use, rest, sentence = PARTS[name]
    gm, values = frozen(*captured(Layer(use), codes(*X), *rest))
    wanted, log = run(gm, values), RuleLog()
    sweep(gm, log)
    assert any(sentence in line for line in log.lines()), "\n".join(log.lines())
    assert len(named(gm, Q.conv.default)) == 1
    found = run(gm, values)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple | list) else [(found, wanted)]
    for a, b in pairs:
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1 if a.dtype is torch.uint8 else 1e-4)


def test_a_residual_of_a_scale_for_each_sample_is_added_as_float():
    use = lambda m, y, r: y + Q.dequantize(r, m.scales, m.zeros, "u8/sample", torch.float32)
    gm, values = frozen(*captured(Layer(use), codes(*X), codes(*SAME)))
    wanted = run(gm, values)
    sweep(gm)
    (conv,) = named(gm, Q.conv.default)
    assert (conv.args[8].target, conv.args[11]) == (Q.dequantize.default, "")
    torch.testing.assert_close(run(gm, values), wanted, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(("weight_type", "transposed"), [("i8/c1", False), ("i8/c0", True)])
def test_weights_have_a_scale_for_each_output_channel(weight_type, transposed):
    gm, values = captured(Layer(lambda m, y: y, weight_type=weight_type, transposed=transposed), codes(*X))
    wanted = run(gm, values)
    (conv,) = named(gm, aten.convolution.default)
    found = find(CONV[0], conv)
    assert isinstance(found, Miss)
    assert "output channel" in found.why
    sweep(gm)
    assert torch.equal(run(gm, values), wanted)


def test_inputs_of_a_scale_for_each_row_do_not_fit():
    gm, _ = captured(Layer(lambda m, y: y, x_type="u8/token"), codes(*X))
    found = find(CONV[0], named(gm, aten.convolution.default)[0])
    assert isinstance(found, Miss)
    assert "u8/token" in found.why


def test_a_match_binds_how_the_convolution_walks():
    gm, _ = captured(Layer(lambda m, y: y), codes(*X))
    found = find(CONV[0], named(gm, aten.convolution.default)[0])
    assert isinstance(found, Match)
    assert (found.bound["padding"], found.bound["groups"], found.bound["xt"]) == ([1, 1], 1, "u8/t")
