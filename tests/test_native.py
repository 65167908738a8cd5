"""The native kernels against the references of their ops, on odd shapes; and what happens where they cannot be built."""

import math

import pytest
import torch
from torch import fx
from torch.nn import functional

import qpass
from qpass.backends import native
from qpass.backends.cpu import native_lower
from qpass.backends.emit import emit
from qpass.backends.native import build, image
from qpass.backends.native.calls import native_calls
from qpass.backends.native.conv_calls import CALLS as CONV_CALLS
from qpass.backends.native.ops import OPS, unpack
from tests.models import batches, encoder, relative
from tests.processors import needs_bytes

Q = torch.ops.qpass
OFFSET = 4  # where linears and convolutions have what a zero point adds
needs_kernels = pytest.mark.skipif(build.unavailable() is not None, reason=f"no native kernels: {build.unavailable()}")
needs_attention = pytest.mark.skipif(not build.has_attention(), reason="no native attention on this processor")


def prepared(op, *args):
    """A function of the inputs that runs an op through its kernel; weights and what belongs to them are constants."""
    module, graph, nodes = torch.nn.Module(), fx.Graph(), []
    for i, value in enumerate(args):
        if not isinstance(value, torch.Tensor):
            nodes.append(value)
        elif is_constant(i, value):
            module.register_buffer(f"c{i}", value)
            nodes.append(graph.get_attr(f"c{i}"))
        else:
            nodes.append(graph.placeholder(f"x{i}"))
            nodes[-1].meta["val"] = value
    node = graph.call_function(op, tuple(nodes))
    graph.output(node)
    gm = fx.GraphModule(module, graph)
    calls = native_calls(gm, (*CONV_CALLS, *image.CALLS))
    assert list(calls) == [node]
    return emit(gm, calls)


def is_constant(position, value):
    return position > 0 and (value.dim() == 1 or value.dtype == torch.int8 or position == OFFSET)


def on_kernel(op, *args):
    """The result of an op through its kernel."""
    inputs = [v for i, v in enumerate(args) if isinstance(v, torch.Tensor) and not is_constant(i, v)]
    return prepared(op, *args)(*inputs)


def linear_arguments(m, n, k, rows, other, act, dtype):
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    packed = build.pack(build.library(), weight)
    assert torch.equal(unpack(packed, n, k), weight)
    x = torch.randint(0, 256, (m, k), dtype=torch.uint8)
    scale, zero = (torch.rand(m, 1) + 0.5, torch.randint(0, 256, (m, 1), dtype=torch.int32)) if rows else (None, None)
    alpha, offset = torch.rand(n) * 1e-3 / math.sqrt(k), weight.sum(1, dtype=torch.int32)
    beside = None if other is None else torch.randn(m, n, dtype=other)
    out = (0.01, 117, dtype) if dtype == torch.uint8 else (1.0, 0, dtype)
    return x, packed, alpha, torch.randn(n), offset, scale, zero, beside, n, act, *out


@needs_kernels
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (7, 17, 33), (6, 64, 4), (13, 130, 101), (97, 200, 384), (0, 5, 8)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize(("rows", "other"), [(False, None), (True, torch.float32), (False, torch.bfloat16)])
def test_linear(m, n, k, dtype, rows, other):
    for act in ("", "relu", "gelu", "gelu_tanh", "silu"):
        args = linear_arguments(m, n, k, rows, other, act, dtype)
        wanted, found = Q.packed_linear.default(*args), on_kernel(Q.packed_linear.default, *args)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        if dtype == torch.uint8:  # a value on the edge of two codes may fall on either side
            assert int((found.int() - wanted.int()).abs().max() if m else 0) <= 1
            assert float((found != wanted).float().mean() if m else 0) < 0.05 + 2 / max(m * n, 1)
        else:
            step = 2e-6 if dtype == torch.float32 else 2**-7  # one unit in the last place
            torch.testing.assert_close(found, wanted, rtol=step, atol=2e-6)


@needs_kernels
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (7, 17, 33), (13, 130, 101), (97, 200, 384), (0, 5, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_only(m, n, k, dtype):
    """The error to float64 is at most twice that of a float32 product."""
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8)
    x, alpha, beta, other = (
        torch.randn(m, k).to(dtype),
        torch.rand(n) * 1e-3,
        torch.randn(n),
        torch.randn(m, n).to(dtype),
    )
    args = (x, build.pack_by_rows(weight), alpha, beta, other, n, "gelu_tanh", dtype)
    found, plain = on_kernel(Q.weight_only_linear.default, *args), Q.weight_only_linear.default(*args)
    exact = functional.gelu((x.double() @ weight.double().t()) * alpha + beta + other, approximate="tanh")
    assert (found.shape, found.dtype) == (plain.shape, dtype)
    worst = [float((y.double() - exact).abs().max()) if m else 0.0 for y in (found, plain)]
    assert worst[0] <= 2 * worst[1] + 1e-6


@needs_attention
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "n", "keys", "width", "out"),
    [(1, 1, 1, 1, 1, 2, 1), (2, 4, 2, 7, 33, 6, 6), (1, 3, 3, 50, 17, 80, 24), (2, 2, 2, 130, 130, 32, 32)],
)
@pytest.mark.parametrize("mask", [None, "bool", "float", "bfloat16", "causal", "keys"])
def test_attention(batch, heads, kv_heads, n, keys, width, out, mask):
    """The error to float64 is at most twice that of torch's bfloat16 attention."""
    q = torch.randn(batch, n, heads, width).bfloat16().transpose(1, 2)
    k, v = torch.randn(batch, kv_heads, keys, width).bfloat16(), torch.randn(batch, kv_heads, keys, out).bfloat16()
    given, causal, scale = None, mask == "causal", 1.3 / math.sqrt(width)
    if mask == "bool":
        given = torch.rand(batch, 1, n, keys) > 0.4
        given[..., 0] = True
    elif mask == "keys":
        given = (torch.rand(batch, 1, 1, keys) > 0.4).expand(batch, 1, n, keys)
        given = given | (torch.arange(keys) == 0)
    elif mask in ("float", "bfloat16"):
        given = torch.randn(1, heads, n, keys, dtype=getattr(torch, {"float": "float32"}.get(mask, mask)))

    def attend(dtype):
        bias = given.to(dtype) if given is not None and given.dtype != torch.bool else given
        parts = (x.to(dtype) for x in (q, k, v))
        return functional.scaled_dot_product_attention(
            *parts, attn_mask=bias, is_causal=causal, scale=scale, enable_gqa=True
        )

    found, wanted = on_kernel(Q.attention.default, q, k, v, given, causal, scale, None, None), attend(torch.float64)
    assert found.shape == wanted.shape
    assert relative(found, wanted) <= 2 * relative(attend(torch.bfloat16), wanted) + 1e-3
    mul, add = torch.rand(heads * out) * 40, torch.randn(heads * out) + 128
    codes = on_kernel(Q.attention.default, q, k, v, given, causal, scale, mul, add)
    exact = (wanted.transpose(1, 2).flatten(-2) * mul + add).round().clamp(0, 255)
    assert codes.dtype == torch.uint8
    assert float((codes.transpose(1, 2).flatten(-2) - exact).abs().max()) <= 2


@needs_attention
def test_a_query_that_sees_nothing_gets_zero():
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    mask[..., 3, :] = False
    found = on_kernel(Q.attention.default, q, k, v, mask, False, 0.3, None, None)
    assert not found[:, :, 3].any()
    assert bool(found[:, :, 2].any())


@needs_kernels
@pytest.mark.parametrize("shape", [(1, 1), (3, 7, 33), (5, 384), (0, 16)])
@pytest.mark.parametrize("rms", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_norm(shape, rms, dynamic, keep):
    width = shape[-1]
    weight, bias = torch.randn(width), None if rms else torch.randn(width)
    mul, add = torch.rand(width) * 30 + 1, torch.randn(width) * 5 + 120
    args = (torch.randn(shape) * 3 + 1, weight, bias, 1e-5, rms, mul, add, dynamic, keep)
    wanted, found = Q.norm_quantize.default(*args), on_kernel(Q.norm_quantize.default, *args)
    for a, b in zip(found, wanted, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    if wanted[1].numel():
        assert int((found[1].int() - wanted[1].int()).abs().max()) <= 1
        torch.testing.assert_close(found[0], wanted[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[2], wanted[2], rtol=1e-5, atol=1e-6)


@needs_kernels
def test_schemas_and_fakes():
    torch.library.opcheck(
        Q.packed_linear.default, linear_arguments(5, 17, 9, True, torch.float32, "relu", torch.float32)
    )
    q, k, v = (torch.randn(1, 2, 5, 8).bfloat16() for _ in range(3))
    torch.library.opcheck(Q.attention.default, (q, k, v, None, False, 0.3, None, None))
    norm = (torch.randn(3, 8), None, None, 1e-5, False, torch.ones(8), torch.zeros(8), True, True)
    torch.library.opcheck(Q.norm_quantize.default, norm)
    assert len(OPS) == 4
    assert all(reference.__doc__ for _, reference, _ in OPS)


@pytest.fixture
def forgetful(monkeypatch):
    """What is known of this machine's kernels is found out anew, in the test and after it; built libraries stay."""
    known = (build.unavailable, build.library)
    for function in known:
        function.cache_clear()
    yield monkeypatch
    monkeypatch.undo()
    for function in known:
        function.cache_clear()


@pytest.fixture
def fresh(forgetful, tmp_path):
    """A machine on which nothing was built yet."""
    forgetful.setenv("XDG_CACHE_HOME", str(tmp_path))
    return forgetful


@needs_bytes
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic"])
def test_without_kernels_onednn_computes_the_same(forgetful, scheme):
    data, model = batches(), encoder()
    plan = qpass.analyze(model, scheme, data[0], data)
    with torch.no_grad():
        wanted = qpass.compile(model, plan=plan, backend="cpu")(data[1])
        forgetful.setattr(build, "processor", lambda: ("a processor", frozenset()))
        build.unavailable.cache_clear()
        assert "lacks avx512f" in native.unavailable()
        q = qpass.compile(model, plan=plan, backend="cpu")
        assert relative(q(data[1]), wanted) < 5e-3
    assert "onednn.qlinear_pointwise" in qpass.inspect(q).graph("lowered")


def test_a_failing_compiler_costs_speed_alone(fresh, tmp_path, caplog):
    if any(flag not in build.processor()[1] for flag in build.REQUIRED):
        pytest.skip("nothing would be built here")
    compiler = tmp_path / "cxx"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && exit 0\necho no space left >&2\nexit 1\n")
    compiler.chmod(0o755)
    fresh.setenv("CXX", str(compiler))
    assert "no space left" in build.unavailable()
    assert "oneDNN and generated kernels are used" in caplog.text
    assert not list(tmp_path.rglob("*.part"))
    assert native_lower.why_not_linear(None) == build.unavailable()


@needs_kernels
def test_a_built_library_is_found_again(forgetful):
    """That of this test run, whose cache began empty."""
    assert build.unavailable() is None
    found = list(build.cache_folder().glob("native-*.so"))
    assert len(found) == 1
    made = found[0].stat().st_mtime_ns
    build.unavailable.cache_clear()
    build.library.cache_clear()
    assert build.unavailable() is None
    assert found[0].stat().st_mtime_ns == made
