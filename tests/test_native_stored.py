"""Weight-only linears on stored codes: few rows and many, against float64, beside what a float linear of that type errs."""

import pytest
import torch
from torch import fx, nn

import qpass
from qpass import affine
from qpass.backends import native
from qpass.backends.native.stored import FEW, stored_call
from qpass.ops import activation
from qpass.packing import halved, halves
from qpass.qtype import QType
from qpass.runtime import runtime_of
from qpass.solvers.rtn import round_to_nearest
from tests.models import relative

needs_kernel = pytest.mark.skipif(
    not (native.unavailable() is None and native.has_attention()), reason="no AVX-512 BF16 or no compiler here"
)
TYPES = (
    "u4/g128",
    "u4/g64",
    "u4/g32",
    "i4/g128",
    "i4/g32",
    "u2/g32",
    "u3/g64",
    "i4/c0",
    "i3/c0",
    "u2/c0",
    "i8/c0",
    "i5/c0",
)


def problem(text, n, k, seed=0):
    torch.manual_seed(seed)
    packed = round_to_nearest(torch.randn(n, k), QType.parse(text))
    data = halved(packed.data) if halves(packed.data, packed.type) else packed.data
    zero = None if packed.zero is None else packed.zero.to(torch.uint8)
    return packed, data, zero


def run(x, packed, data, zero, bias=None, other=None, act="", dtype=torch.float32):
    """The kernel's result, by the call that a lowered graph makes."""
    graph = fx.Graph()
    module = nn.Module()
    arguments = {"x": x, "data": data, "scale": packed.scale, "zero": zero, "bias": bias, "other": other}
    nodes = {}
    for name, value in arguments.items():
        if value is None:
            nodes[name] = None
        elif name in ("x", "other"):
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = value
        else:
            module.register_buffer(name, value)
            nodes[name] = graph.get_attr(name)
    order = (nodes["x"], nodes["data"], nodes["scale"], nodes["zero"], str(packed.type), nodes["bias"], nodes["other"])
    node = graph.call_function(torch.ops.qpass.stored_linear.default, (*order, act, dtype))
    gm = fx.GraphModule(module, graph)
    assert gm is node.graph.owning_module
    function, _ = stored_call(node)
    return function(x, other)


def wanted(x, packed, bias=None, other=None, act=""):
    real = affine.dequantize(packed.data, packed.scale, packed.zero, packed.type, torch.float64)
    y = x.double() @ real.t()
    y = y if bias is None else y + bias.double()
    return activation(act)(y if other is None else y + other.double()), real


def plain_error(x, real, act="", bias=None, other=None):
    """What torch errs in x's dtype with the same weight in that dtype, relative to float64."""
    y = nn.functional.linear(x, real.to(x.dtype), None if bias is None else bias.to(x.dtype))
    y = activation(act)(y if other is None else y + other.to(x.dtype))
    return relative(y, wanted_of(x, real, bias, other, act))


def wanted_of(x, real, bias, other, act):
    y = x.double() @ real.t()
    y = y if bias is None else y + bias.double()
    return activation(act)(y if other is None else y + other.double())


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("text", TYPES)
def test_beside_a_float_linear(text, dtype):
    group = QType.parse(text).group
    for n, k in ((1, 128), (33, 384), (50, 96 if group in (None, 32) else 256), (16, 256)):
        packed, data, zero = problem(text, n, k)
        for rows in (0, 1, 2, 5, FEW[dtype], FEW[dtype] + 1, 64):
            x = torch.randn(rows, k).to(dtype)
            y, real = wanted(x, packed)
            found = run(x, packed, data, zero, dtype=dtype)
            assert found.shape == (rows, n)
            assert found.dtype is dtype
            if rows:
                limit = 1.5 * plain_error(x, real) + (2e-7 if dtype is torch.float32 else 1e-3)
                assert relative(found, y) <= limit, (text, n, k, rows)


@needs_kernel
@pytest.mark.parametrize("act", ["", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_what_follows_the_product(act, rows):
    packed, data, zero = problem("u4/g32", 37, 160)
    for x_type, other_type, out in (
        (torch.float32, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, None, torch.float32),
    ):
        x, bias = torch.randn(2, rows, 160).to(x_type), torch.randn(37)
        other = None if other_type is None else torch.randn(2, rows, 37).to(other_type)
        found = run(x, packed, data, zero, bias, other, act, out)
        y, _ = wanted(x, packed, bias, other, act)
        assert found.dtype is out
        assert found.shape == (2, rows, 37)
        assert relative(found, y) < (1e-5 if x_type is torch.float32 else 8e-3)


@needs_kernel
def test_extremes_are_exact():
    """Codes and inputs that are whole numbers give whole numbers."""
    for text, k in (("u4/g32", 96), ("i4/c0", 66), ("i8/c0", 37), ("u2/g64", 128)):
        qtype = QType.parse(text)
        codes = torch.randint(qtype.qmin, qtype.qmax + 1, (19, k)).to(qtype.storage)
        shape = (19, k // qtype.group) if qtype.group else (19,)
        zero = None if qtype.signed else torch.randint(0, qtype.qmax + 1, shape)
        packed = type(round_to_nearest(torch.randn(2, 64), QType.parse("i8/c0")))(
            codes, torch.ones(shape), qtype, None, zero
        )
        data = halved(codes) if halves(codes, qtype) else codes
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randint(-8, 9, (3, k)).to(dtype)
            found = run(x, packed, data, None if zero is None else zero.to(torch.uint8))
            assert torch.equal(found.double(), wanted(x, packed)[0]), text


@needs_kernel
def test_float32_inputs_of_any_size():
    """An input is split into three parts without loss, large or small."""
    packed, data, zero = problem("u4/g64", 24, 128)
    for size in (1e-20, 1e-3, 1.0, 1e20):
        x = torch.randn(2, 128) * size
        assert relative(run(x, packed, data, zero), wanted(x, packed)[0]) < 1e-6


@needs_kernel
@pytest.mark.parametrize("scheme", ["w4a16-g32", "w8a16", "w4a16-c"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_reads_its_own_buffers(scheme, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 32, bias=False)).to(dtype).eval()
    q = qpass.compile(model, scheme, backend="cpu")
    for rows in (1, 4, 50):
        x = torch.randn(rows, 64).to(dtype)
        assert relative(q(x), q._call_impl(x)) < (1e-5 if dtype is torch.float32 else 1e-2)
    text = qpass.inspect(q).graph("lower")
    assert text.count("qpass.stored_linear") == 2, text
    (record, *_) = runtime_of(q).records
    assert not record.kept


@needs_kernel
def test_a_replaced_weight_is_noticed():
    model = nn.Sequential(nn.Linear(64, 32)).eval()
    q = qpass.compile(model, "w4a16-g32", backend="cpu")
    x = torch.randn(2, 64)
    q(x)
    q.load_state_dict({key: value.clone() for key, value in q.state_dict().items()}, assign=True)
    with pytest.warns(UserWarning, match="replaced or written to"):
        q(x)
