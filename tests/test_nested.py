"""Nested weights: what they stand for at each width, and where they come from."""

import pytest
import torch
from torch import nn

import qpass
from qpass import affine, nested
from qpass.decide_nested import scheme_at
from qpass.errors import QpassError
from qpass.packing import halved, pack
from qpass.qtype import QType
from qpass.schemes import Scheme
from qpass.solvers.nested import nested as solve
from tests.models import relative

Q = torch.ops.qpass
SHAPES = [("u{8,4,2}/g8", 5, 32), ("u{8,4,2}/c0", 3, 20), ("u{8,4}/g4", 7, 12), ("u{4,2}/g16", 1, 16)]


def parts(weight, qtype):
    """(what 4 and 2 bits are alone, their float values)."""
    packed, real = {}, {}
    for bits in (b for b in qtype.widths if b <= 4):
        kind = nested.type_at(qtype, bits)
        params = affine.choose_qparams(*affine.limits(weight, kind), kind)
        codes = affine.quantize(weight, params.scale, params.zero, kind)
        packed[bits] = pack(codes, params.scale, kind, None, params.zero)
        real[bits] = affine.dequantize(codes, params.scale, params.zero, kind)
    return packed, real


@pytest.mark.parametrize(("text", "n", "k"), SHAPES)
def test_each_width_is_what_it_is_alone_and_8_bits_correct_4(text, n, k):
    torch.manual_seed(n)
    weight, qtype = torch.randn(n, k), QType.parse(text)
    alone, real = parts(weight, qtype)
    packed = solve(weight, None, qtype, alone)
    assert packed.shape == (n, k)
    assert packed.stored.dtype == torch.uint8
    assert packed.stored.numel() * 8 == n * k * sum({8: 4, 4: 4, 2: 2}[bits] for bits in qtype.widths)
    for bits, wanted in real.items():
        assert torch.equal(nested.real_weight(packed, bits), wanted)
    if 8 in qtype.widths:
        best = nested.real_weight(packed)
        assert relative(best, weight) < relative(real[4], weight) / 8
        half = nested.type_at(qtype, 8)
        step, zero = (affine.expand(t[0], half, 2) for t in (packed.scale, packed.stored_zero))
        low = (best - real[4]) / step + zero
        assert torch.allclose(low, low.round().clamp(0, 15), atol=2e-2)


def test_codes_of_2_bits_share_bytes():
    codes = torch.randint(0, 4, (3, 24), dtype=torch.uint8)
    data = nested.quartered(codes)
    assert data.shape == (3, 6)
    assert torch.equal(nested.unquartered(data), halved(codes))


def test_a_width_reads_its_own_planes_alone():
    torch.manual_seed(1)
    weight, qtype = torch.randn(6, 16), QType.parse("u{8,4,2}/g8")
    packed = solve(weight, None, qtype, parts(weight, qtype)[0])
    for bits, planes in ((4, (0, 1)), (8, (0, 1, 2, 3)), (2, (4,))):
        other = packed.stored.clone()
        unread = [p for p in range(5) if p not in planes]
        other[unread] = torch.randint_like(other[unread], 256)
        args = (packed.scale, packed.stored_zero, qtype, bits)
        assert torch.equal(nested.dequantized(other, *args), nested.dequantized(packed.stored, *args))
    view = nested.plane(packed.stored, qtype, 4)
    assert view.shape == (6, 8)
    assert view.data_ptr() == packed.stored.data_ptr()


def test_moments_make_8_bits_better_where_it_matters():
    torch.manual_seed(2)
    x = torch.randn(500, 6) @ torch.randn(6, 32) + 0.1 * torch.randn(500, 32)
    weight, qtype = torch.randn(24, 32), QType.parse("u{8,4,2}/g16")
    alone, moments = parts(weight, qtype)[0], (x.T @ x).double() / 500
    blind, seen = (nested.real_weight(solve(weight, m, qtype, alone)) for m in (None, moments))
    assert relative(x @ seen.T, x @ weight.T) < 0.7 * relative(x @ blind.T, x @ weight.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_ops(dtype):
    torch.manual_seed(3)
    weight, qtype = torch.randn(6, 16), QType.parse("u{8,4,2}/g8")
    packed = solve(weight, None, qtype, parts(weight, qtype)[0])
    bits, x, bias = torch.tensor(4), torch.randn(2, 3, 16, dtype=dtype), torch.randn(6)
    held = (packed.stored, packed.scale, packed.stored_zero, bits, str(qtype))
    for width in (8, 4, 2):
        bits.fill_(width)
        real = Q.nested(*held, dtype)
        wanted = nested.real_weight(packed, width)
        torch.testing.assert_close(real, wanted.to(dtype))
        y = Q.nested_linear(x, *held, bias, dtype)
        bound = 1e-5 if dtype != torch.bfloat16 else 3e-2
        torch.testing.assert_close(y.float(), x.float() @ wanted.T + bias, rtol=bound, atol=bound)
    if dtype == torch.float32:
        torch.library.opcheck(Q.nested.default, (*held, dtype))
        torch.library.opcheck(Q.nested_linear.default, (x, *held, bias, dtype))


class Turned(nn.Module):
    """A weight held as [K, N], as in GPT-2, and one of fewer inputs than a group."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(32, 24)), nn.Parameter(torch.randn(24))
        self.down = nn.Linear(24, 8)

    def forward(self, x):
        return self.down(torch.addmm(self.bias, x, self.weight).relu())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_weights_held_the_other_way_round(backend):
    torch.manual_seed(4)
    model, x = Turned().eval(), torch.randn(5, 32)
    q = qpass.compile(model, "w{8,4,2}a16", x, backend=backend)
    plan = qpass.analyze(model, "w{8,4,2}a16", x)
    assert {str(d.weight_type) for d in plan.quantized} == {"u{8,4,2}/c1", "u{8,4,2}/c0"}
    wanted = model(x).detach()
    errors = []
    for bits in (8, 4, 2):
        qpass.set_bits(q, bits)
        found = q(x)
        errors.append(relative(found, wanted))
        torch.testing.assert_close(found, q._call_impl(x), rtol=1e-4, atol=1e-4)  # the packed model, in eager mode
    assert errors[0] < 0.02 < errors[1] < 0.2 < errors[2] < 1


def test_what_a_nested_scheme_is_at_a_width():
    s = Scheme.parse("w{8,4}a16-g32,solver=hqq")
    assert [str(scheme_at(s, b)) for b in (8, 5, 4, 2)] == [
        "w8a16-g32,solver=hqq,bias=none", *["w4a16-g32,solver=hqq,bias=none"] * 3
    ]  # fmt: skip
    plain = Scheme.parse("w8a8")
    assert scheme_at(plain, 2) is plain


@pytest.mark.parametrize(
    "text", ["w{8,4,2}a16", "w{8,4}a16-g32", "w{4,2}a16-c", "w{8,4,2}a16-g64,solver=hqq,sequential=no"]
)
def test_schemes_print_as_they_parse(text):
    assert str(Scheme.parse(text)) == text
    qtype = Scheme.parse(text).weight
    assert QType.parse(str(qtype)) == qtype


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("w{4,8}a16", r"go down.*\{8,4\}"),
        ("w{8}a16", "write w8a16"),
        ("w{8,4,2}a8", "inputs that stay float; write w.8,4,2.a16"),
        ("w{8,4,3}a16", "8, 4, 2 of them, not 3"),
        ("w{8,2}a16", "4 has to be one"),
        ("w{}a16", "whole numbers"),
        ("w{8,4,4}a16", r"\{8,4\}"),
        ("w{8,4,2}a16,solver=awq", "awq moves a factor"),
        ("w{8,4,2}a16-dynamic", "nothing dynamic"),
        ("w{8,4a16", "not known"),
    ],
)
def test_schemes_that_cannot_be(text, match):
    with pytest.raises(QpassError, match=match):
        Scheme.parse(text)


@pytest.mark.parametrize("text", ["u{4,8}/g32", "u{8,5}/g32", "u{8,4,2}/x", "i{8,4}/c0", "u{8,4}"])
def test_types_that_cannot_be(text):
    with pytest.raises(QpassError):
        QType.parse(text)


def test_what_cannot_be_nested_says_so():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Conv1d(4, 6, 1), nn.Flatten(), nn.Linear(18, 8), nn.Linear(8, 4)).eval()
    plan = qpass.analyze(model, "w{8,4,2}a16", torch.randn(2, 4, 3))
    why = {d.site: d.why for d in plan if not d.is_output}
    assert "linears alone" in why["0:conv1d.0"]
    assert "18 inputs are no multiple of 4" in why["2:linear.0"]
    assert not why["3:linear.0"]


@pytest.mark.parametrize("scheme", ["w{8,4,2}a16-g32", "w{8,4}a16-c"])
@pytest.mark.parametrize("backend", ["triton", "cpu"])
def test_backends_give_what_the_reference_does(scheme, backend):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(96, 80), nn.Linear(80, 64, bias=False)).eval().to(torch.bfloat16)
    x, many = torch.randn(2, 96).to(torch.bfloat16), torch.randn(3, 20, 96).to(torch.bfloat16)
    q, wanted = (qpass.compile(model, scheme, x, backend=name) for name in (backend, "reference"))
    if backend == "triton":
        assert "qpass.kernel_nested" in qpass.inspect(q).graph("lower")
    for bits in Scheme.parse(scheme).weight.widths:
        for given in (x, many):
            with qpass.at_bits(q, bits), qpass.at_bits(wanted, bits):
                assert relative(q(given), wanted(given)) < 0.01
