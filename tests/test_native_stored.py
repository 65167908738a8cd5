"""Weight-only linears on stored codes: few rows and many, against float64, beside what a float linear of that type errs."""

import pytest
import torch
from torch import fx, nn

import qpass
from qpass import affine
from qpass.backends import native
from qpass.backends.native.stored import FEW, stored_call
from qpass.ops import activation
from qpass.packing import halved, halves, pack
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


INPUTS = ("x", "other", "x_scale", "x_zero")


def problem(text, n, k, seed=0):
    torch.manual_seed(seed)
    packed = round_to_nearest(torch.randn(n, k), QType.parse(text))
    data = halved(packed.data) if halves(packed.data, packed.type) else packed.data
    zero = None if packed.zero is None else packed.zero.to(torch.uint8)
    return packed, data, zero


def run(x, packed, data, zero, bias=None, other=None, act="", dtype=torch.float32, rows=(None, None)):
    """The kernel's result, by the call that a lowered graph makes. rows: scale and zero point of an x of codes."""
    graph = fx.Graph()
    module = nn.Module()
    arguments = {"x": x, "data": data, "scale": packed.scale, "zero": zero, "bias": bias, "other": other}
    arguments |= {"x_scale": rows[0], "x_zero": rows[1]}
    nodes = {}
    for name, value in arguments.items():
        if value is None:
            nodes[name] = None
        elif name in INPUTS:
            nodes[name] = graph.placeholder(name)
            nodes[name].meta["val"] = value
        else:
            module.register_buffer(name, value)
            nodes[name] = graph.get_attr(name)
    order = (nodes["x"], nodes["data"], nodes["scale"], nodes["zero"], str(packed.type), nodes["bias"], nodes["other"])
    node = graph.call_function(
        torch.ops.qpass.stored_linear.default, (*order, act, dtype, nodes["x_scale"], nodes["x_zero"])
    )
    gm = fx.GraphModule(module, graph)
    assert gm is node.graph.owning_module
    function, _ = stored_call(node)
    return function(x, other, *rows)


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
        packed = pack(codes, torch.ones(shape), qtype, None, zero)
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


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("input_type", ["u8/token", "u8/t"])
@pytest.mark.parametrize("text", ["u4/g128", "u4/g64", "i4/g32", "u3/g32", "i4/c0", "u2/c0", "i8/g64", "i8/c0"])
def test_inputs_of_codes(text, input_type, dtype):
    """Whole numbers all the way: of a few rows the only error is float32's, of many that of the result's type."""
    input_type = QType.parse(input_type)
    for n, k in ((1, 128), (35, 384), (16, 256), (20, 94 if QType.parse(text).group is None else 128)):
        packed, data, zero = problem(text, n, k)
        for rows in (0, 1, 3, FEW[torch.uint8], FEW[torch.uint8] + 1, 50):
            x = torch.randn(2, rows, k) + 1
            scale, low = (torch.tensor(0.03), torch.tensor(90)) if not rows else affine.choose_dynamic(x, input_type)
            if not rows and input_type.granularity == "token":
                scale, low = torch.rand(2, 0, 1), torch.zeros(2, 0, 1)
            low = low.to(torch.int32)
            codes = affine.quantize(x, scale, low, input_type)
            bias, other = torch.randn(n), torch.randn(2, rows, n).to(dtype)
            found = run(codes, packed, data, zero, bias, other, "gelu", dtype, (scale, low))
            y, _ = wanted((codes.double() - low) * scale.double(), packed, bias, other, "gelu")
            assert found.shape == (2, rows, n)
            assert found.dtype is dtype
            if rows:
                assert relative(found, y) < (1e-5 if dtype is torch.float32 else 6e-3), (n, k, rows)


@needs_kernel
def test_codes_of_extremes_are_exact():
    torch.manual_seed(3)
    for text, k in (("u4/g32", 96), ("u4/g64", 192), ("i4/c0", 66), ("i8/c0", 37), ("u2/g64", 128)):
        qtype = QType.parse(text)
        weight = torch.randint(qtype.qmin, qtype.qmax + 1, (19, k)).to(qtype.storage)
        shape = (19, k // qtype.group) if qtype.group else (19,)
        zero = None if qtype.signed else torch.randint(0, qtype.qmax + 1, shape)
        data = halved(weight) if halves(weight, qtype) else weight
        packed = pack(weight, torch.ones(shape), qtype, None, zero)
        for rows in (3, 40):
            x = torch.randint(0, 2, (rows, k), dtype=torch.uint8) * 255
            scale, low = torch.ones(rows, 1), torch.randint(0, 256, (rows, 1), dtype=torch.int32)
            kept = None if zero is None else zero.to(torch.uint8)
            found = run(x, packed, data, kept, rows=(scale, low))
            assert torch.equal(found.double(), wanted(x.double() - low, packed)[0]), (text, rows)


@needs_kernel
@pytest.mark.parametrize("scheme", ["w4a8-dynamic", "w4a8-dynamic-g32", "w4a8", "w3a8-dynamic-g64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiled_model_with_inputs_of_codes(scheme, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 32), nn.Linear(32, 64)).to(dtype).eval()
    batches = None if "dynamic" in scheme else [torch.randn(50, 128).to(dtype) for _ in range(4)]
    plan = qpass.analyze(model, scheme, torch.randn(2, 128).to(dtype), batches)
    q = qpass.compile(model, plan=plan, backend="cpu")
    reference = qpass.compile(model, plan=plan, backend="reference")
    for rows in (1, 4, 50):
        x = torch.randn(rows, 128).to(dtype)
        one_code = 2e-3 if dtype is torch.float32 else 2e-2  # a tie at the next layer's input may fall either way
        assert relative(q(x), reference(x)) < one_code
    text = qpass.inspect(q).graph("lower")
    assert text.count("qpass.stored_linear") >= 2, text
