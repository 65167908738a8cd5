"""oneDNN's convolutions against the reference of the fused op, on odd shapes and every epilogue."""

import pytest
import torch
from torch import nn

from qpass.backends import cpu
from qpass.backends.onednn_conv import CALLS, SUM, lower_conv, why_not
from qpass.conv_ops import conv_shape
from qpass.passes.layout import layout
from qpass.pipeline import Context
from tests.graphs import captured, frozen, named, run
from tests.processors import needs_bytes

aten = torch.ops.aten
Q = torch.ops.qpass
pytestmark = needs_bytes

# sizes of x, shape of weight, stride, padding, dilation, groups
WALKS = {
    "one channel": ((2, 1, 9, 7), (1, 1, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "three to five": ((2, 3, 9, 7), (5, 3, 3, 2), (2, 1), (0, 1), (1, 1), 1),
    "seventeen": ((1, 17, 5, 5), (17, 17, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "a large kernel": ((1, 3, 19, 17), (5, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    "dilated": ((2, 5, 11, 9), (3, 5, 3, 3), (1, 2), (2, 2), (2, 2), 1),
    "groups": ((2, 6, 7, 7), (10, 3, 3, 3), (1, 1), (1, 1), (1, 1), 2),
    "depthwise": ((3, 17, 7, 6), (17, 1, 3, 3), (2, 2), (1, 1), (1, 1), 17),
    "one pixel": ((1, 5, 1, 1), (3, 5, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "one axis": ((2, 3, 17), (5, 3, 4), (2,), (3,), (1,), 1),
    "three axes": ((1, 3, 4, 5, 6), (5, 3, 2, 3, 1), (1, 2, 1), (0, 1, 0), (1, 1, 1), 1),
}
OUTPUTS = {"float": ("", torch.float32), "half": ("", torch.bfloat16), "codes": ("u8/t", torch.float32)}


class Fused(nn.Module):
    """One fused convolution: residual "", "float" or "codes", how it is quantized, and who else reads the residual."""

    def __init__(
        self,
        walk,
        act="",
        residual="",
        output="codes",
        bias=True,
        slope=False,
        read="",
        x_type="u8/t",
        transposed=False,
    ):
        super().__init__()
        self.shape, weight, *walk, groups = walk
        self.walk = (*map(list, walk), transposed, [0] * len(walk[0]), groups)
        self.act, self.residual, self.read, self.x_type = "prelu" if slope else act, residual, read, x_type
        self.output, n = OUTPUTS[output], weight[0] if not transposed else weight[1] * groups
        self.channels = f"i8/c{int(transposed)}"
        held = {
            "w": torch.randint(-127, 128, weight, dtype=torch.int8),
            "ws": torch.rand(weight[int(transposed)]) / 500 + 1e-3,
        }
        held |= {"xs": torch.tensor(0.021), "xz": torch.tensor(113, dtype=torch.int32), "os": torch.tensor(0.04)}
        held |= {
            "oz": torch.tensor(90, dtype=torch.int32),
            "rs": torch.tensor(0.033),
            "rz": torch.tensor(130, dtype=torch.int32),
        }
        held |= {"b": torch.randn(n) if bias else None, "slope": torch.rand(n) if slope else None}
        for name, value in held.items():
            self.register_buffer(name, value)

    def forward(self, x, r):
        other = (None, None, None, "")
        if self.residual == "codes":
            r = r.bitwise_xor(1)  # made by the graph, as a residual is
            other = (r, self.rs, self.rz, "u8/t")
        if self.residual == "float":
            r = r * 2
            other = (r, None, None, "")
        if self.residual == "half":
            other = (r := (r * 2).bfloat16(), None, None, "")
        qtype, dtype = self.output
        out = (self.os, self.oz, qtype) if qtype else (None, None, "")
        weight = (self.w, self.ws, self.channels, self.b)
        y = Q.conv(x, self.xs, self.xz, self.x_type, *weight, *other, self.act, self.slope, *out, dtype, *self.walk)
        return (y, r + 0) if self.read == "after" else y


def images(model):
    """x, and a residual of the result's shape."""
    x = torch.randint(0, 256, model.shape, dtype=torch.uint8)
    shape = conv_shape(model.shape, model.w.shape, *model.walk)
    return x, torch.randn(shape) if model.residual in ("float", "half") else torch.randint(
        0, 256, shape, dtype=torch.uint8
    )


def lowered(model):
    """(graph with oneDNN's calls, its inputs, the reference's result)."""
    gm, values = frozen(*captured(model, *images(model)))
    wanted = run(gm, [v.clone() if isinstance(v, torch.Tensor) else v for v in values])
    (node,) = named(gm, Q.conv.default)
    assert why_not(node) is None
    node.replace_all_uses_with(lower_conv(gm, node))
    gm.graph.eliminate_dead_code()
    layout(gm, Context(backend=cpu.BACKEND))
    gm.recompile()
    return gm, values, wanted


def near(found, wanted):
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if wanted.dtype is torch.uint8:
        off = (found.int() - wanted.int()).abs()
        assert int(off.max()) <= 1  # on the edge of two codes
        assert float((off > 0).float().mean()) < 0.02
        return
    step = 1e-2 if wanted.dtype is torch.bfloat16 else 1e-5
    torch.testing.assert_close(found.double(), wanted.double(), rtol=step, atol=step * float(wanted.abs().max()))


def check(model):
    gm, values, wanted = lowered(model)
    kept = [v.clone() if isinstance(v, torch.Tensor) else v for v in values]
    found = run(gm, values)
    for a, b in zip(*((out,) if isinstance(out, torch.Tensor) else out for out in (found, wanted)), strict=True):
        near(a, b)
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True) if isinstance(a, torch.Tensor))
    return gm


@pytest.mark.parametrize(("name", "output"), [(w, list(OUTPUTS)[i % 3]) for i, w in enumerate(WALKS)])
def test_shapes(name, output):
    gm = check(Fused(WALKS[name], output=output))
    assert sum(node.target in CALLS for node in gm.graph.nodes) == 1


def test_without_bias():
    check(Fused(WALKS["groups"], bias=False))


ACTS = ("relu", "relu6", "hardswish", "silu", "hardsigmoid", "sigmoid", "gelu", "gelu_tanh")


@pytest.mark.parametrize("residual", ["", "float", "codes"])
@pytest.mark.parametrize("act", ACTS)
def test_epilogues(act, residual):
    output = list(OUTPUTS)[(ACTS.index(act) + len(residual)) % 3]
    check(Fused(WALKS["three to five"], act, residual, output))


@pytest.mark.parametrize("act", ["relu", "gelu"])
@pytest.mark.parametrize("name", ["one axis", "three axes"])
def test_activations_on_other_axes(name, act):
    check(Fused(WALKS[name], act))


@pytest.mark.parametrize("residual", ["", "codes"])
def test_prelu(residual):
    check(Fused(WALKS["groups"], slope=True, residual=residual))


@pytest.mark.parametrize("name", ["one channel", "depthwise", "three axes"])
@pytest.mark.parametrize(
    ("residual", "output"), [("codes", "codes"), ("float", "float"), ("codes", "float"), ("float", "codes")]
)
def test_residuals(name, residual, output):
    gm = check(Fused(WALKS[name], "relu", residual, output))
    in_place = residual == ("codes" if output == "codes" else "float") and len(WALKS[name][0]) == 4
    assert bool(named(gm, SUM)) == (in_place and residual == output)


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_residual_of_another_type(output):
    """A sum in place would give its type back."""
    gm = check(Fused(WALKS["three to five"], "relu", "half", output))
    assert not named(gm, SUM)


@pytest.mark.parametrize(("residual", "output"), [("codes", "codes"), ("float", "float")])
def test_a_residual_that_others_read_is_copied(residual, output):
    copies = [
        len(named(check(Fused(WALKS["three to five"], "relu", residual, output, read=read)), aten.clone.default))
        for read in ("", "after")
    ]
    assert copies == [2, 3]  # two of the layout


class Aliased(Fused):
    """The residual shares memory with what somebody reads after the sum, or with the convolution's own input."""

    def __init__(self, share):
        super().__init__(((4, 6, 5, 5), (6, 6, 3, 3), (1, 1), (1, 1), (1, 1), 1), residual="codes")
        self.share = share

    def conv(self, x, r):
        rest = (r, self.rs, self.rz, "u8/t", "relu", None, self.os, self.oz, "u8/t", torch.float32)
        return Q.conv(x, self.xs, self.xz, "u8/t", self.w, self.ws, "i8/c0", self.b, *rest, *self.walk)

    def forward(self, x, r):
        return self.share(self, x, r.bitwise_xor(1).contiguous(memory_format=torch.channels_last))


SHARED = {
    "its own input": lambda m, x, r: m.conv(r, r),
    "the other half of the batch": lambda m, x, r: (m.conv(x[:2], r.chunk(2)[0]), r + 0),
    "one view of it": lambda m, x, r: (m.conv(x, r.unsqueeze(0).squeeze(0)), r + 0),
    "its input is a view": lambda m, x, r: m.conv(r.unsqueeze(0).squeeze(0), r),
    "the input of the graph": lambda m, x, r: (m.conv(x, x), x + 0),
}


@pytest.mark.parametrize("name", SHARED)
def test_memory_that_others_read_is_not_written_to(name):
    gm = check(Aliased(SHARED[name]))
    assert len(named(gm, SUM)) == 1


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"x_type": "u8/sample"}, "read u8/t with a constant scale, not u8/sample"),
        ({"transposed": True}, "no transposed convolution of integers"),
    ],
)
def test_refused(options, sentence):
    model = Fused(((2, 6, 5, 5), (6, 6, 3, 3), (1, 1), (0, 0), (1, 1), 1), **options)
    gm, _ = frozen(*captured(model, *images(model)))
    assert sentence in why_not(named(gm, Q.conv.default)[0])


def test_a_scale_that_is_not_constant_is_refused():
    model = Fused(WALKS["groups"])
    gm, _ = captured(model, *images(model))
    (node,) = named(gm, Q.conv.default)
    del node.args[1].meta["value"]
    assert "constant scale" in why_not(node)
