"""Each rule of subgradients, element by element, against its paper's formula and differences of a smooth surrogate."""

import pytest
import torch

from qpass import affine
from qpass.errors import QpassError
from qpass.qat import fused
from qpass.qat.arithmetic import ABOVE, BELOW, PARTS, backward, forward
from qpass.qat.dynamic import fake_quantize_dynamic
from qpass.qat.fake_quantize import fake_quantize
from qpass.qat.subgradients import METHODS, lsq, lsq_plus, method_named
from qpass.qat.subgradients.ewgs import DELTA, EWGS
from qpass.qat.subgradients.lsq import LSQ
from qpass.qat.subgradients.lsq_plus import LSQ_PLUS
from qpass.qat.subgradients.pact import PACT
from qpass.qat.subgradients.straight_through import STRAIGHT_THROUGH
from qpass.qparams import QParams
from qpass.qtype import QType, scale_shape

TYPES = ("u4/t", "i4/t", "i8/c0", "i3/c1", "u2/g8", "u4/g16", "i4/g8")
RULES = (STRAIGHT_THROUGH, LSQ, LSQ_PLUS, PACT, EWGS)


def case(text, dtype=torch.float64, shape=(6, 16)):
    """(type, x, step, offset or None): some of x far outside."""
    qtype = QType.parse(text)
    step = torch.rand(scale_shape(qtype, shape)) * 0.2 + 0.2
    offset = None if qtype.symmetric else torch.full_like(step, (qtype.qmax + 1) // 2) + 0.3
    x = torch.randn(shape, dtype=dtype) * qtype.qmax * 0.2
    return qtype, x, step, offset


def parts(qtype, x, step, offset):
    """v, z, below, above of every element, as the papers write them."""
    s = affine.expand(step, qtype, x.dim()).double()
    z = torch.zeros_like(s) if offset is None else affine.expand(offset, qtype, x.dim()).double().round()
    v = x.double() / s
    return v, z, s, v + z <= qtype.qmin, v + z >= qtype.qmax


def published(rule, g, v, z, s, below, above, qtype):
    """dL/dx, dL/ds, dL/dz of each element, written out anew from the papers."""
    inside = ~(below | above)
    dx = g * inside
    round_less = torch.where(below, qtype.qmin - z, torch.where(above, qtype.qmax - z, v.round() - v))
    ds, dz = {
        "ste": (None, None),
        "lsq": (g * round_less, None),
        "lsq+": (g * round_less, -g * s * ~inside),
        "pact": (g * above * (qtype.qmax - z), None),
        "ewgs": (g * round_less, -g * s * ~inside),
    }[rule.name]
    if rule.name == "ewgs":
        dx = dx * (1 + DELTA * g.sign() * (v - v.round()))
    return dx, ds, dz


def per_step(terms, qtype, shape):
    """Sums of elements by their step, with a loop."""
    index = torch.arange(torch.Size(scale_shape(qtype, shape)).numel()).reshape(scale_shape(qtype, shape))
    where = affine.expand(index, qtype, len(shape)).expand(shape)
    return torch.stack([terms[where == i].sum() for i in index.flatten()]).reshape(index.shape)


@pytest.mark.parametrize("text", TYPES)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_published_formulas(rule, text):
    qtype, x, step, offset = case(text)
    x.requires_grad_()
    step.requires_grad_()
    if offset is not None:
        offset.requires_grad_()
    y = fake_quantize(x, step, offset, qtype, rule, parameter=True)
    g = torch.randn_like(y)
    y.backward(g)
    dx, ds, dz = published(rule, g, *parts(qtype, x.detach(), step.detach(), offset), qtype)
    scale = (x.numel() / step.numel() * qtype.qmax) ** -0.5
    torch.testing.assert_close(x.grad, dx)
    for tensor, terms in ((step, ds), (offset, dz)):
        if tensor is None or terms is None:
            assert tensor is None or tensor.grad is None
        else:
            torch.testing.assert_close(
                tensor.grad.double(), per_step(terms, qtype, x.shape) * scale, rtol=1e-5, atol=1e-6
            )


@pytest.mark.parametrize("text", TYPES)
def test_the_forward_pass_is_the_affine_formula(text):
    qtype, x, step, offset = case(text, torch.float32)
    zero = None if offset is None else offset.round().to(torch.int32)
    assert torch.equal(fake_quantize(x, step, offset, qtype, LSQ), affine.fake_quantize(x, QParams(step, zero, qtype)))


@pytest.mark.parametrize("text", TYPES)
def test_differences_of_the_smooth_surrogate(text):
    """With round(v) - v held, y is a smooth function of step and offset, and LSQ+'s subgradients are its derivatives."""
    qtype, x, step, offset = case(text)
    v, z, _, below, above = parts(qtype, x, step, offset)
    shift = v.round() - v
    sure = ((v + z - qtype.qmin).abs() > 1e-3) & ((v + z - qtype.qmax).abs() > 1e-3)
    x = torch.where(sure, x, 0.0)
    v, z, _, below, above = parts(qtype, x, step, offset)

    def surrogate(x, s, z):
        wide_s, wide_z = (affine.expand(t, qtype, 2) for t in (s, z))
        inside = x / wide_s + torch.where(sure, shift, 0.0)
        return torch.where(below, qtype.qmin - wide_z, torch.where(above, qtype.qmax - wide_z, inside)) * wide_s

    whole = torch.zeros_like(step).double() if offset is None else offset.double().round()
    direction = [torch.randn(t.shape, dtype=torch.float64) for t in (x, step, whole)]
    eps = 1e-6
    moved = [
        [t.double() + sign * eps * d for t, d in zip((x, step, whole), direction, strict=True)] for sign in (1, -1)
    ]
    if offset is None:
        moved[0][2] = moved[1][2] = whole
    g = torch.randn_like(x)
    wanted = ((surrogate(*moved[0]) - surrogate(*moved[1])) / (2 * eps) * g).sum()
    dx, ds, dz = backward(g, x, step.double(), None if offset is None else whole, qtype, LSQ_PLUS, torch.float64)
    found = (dx * direction[0]).sum() + (ds * direction[1]).sum()
    found = found if dz is None else found + (dz * direction[2]).sum()
    assert bool((below | above).any())
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_one_byte_an_element_is_enough(rule):
    """The backward pass from codes is that from x: dL/dx equal but for EWGS, sums to the precision of a residual."""
    qtype, x, step, offset = case("u4/t", torch.float32, (64, 256))
    g = torch.randn_like(x)
    _, code, _ = forward(x, step, offset.round(), qtype, torch.float32, True)
    assert code.dtype == torch.int8
    assert bool((code == BELOW).any())
    assert bool((code == ABOVE).any())
    whole, short = (backward(g, t, step, offset.round(), qtype, rule, torch.float32) for t in (x, code))
    torch.testing.assert_close(short[0], whole[0], rtol=DELTA / PARTS, atol=0)
    if whole[1] is not None:
        bound = x.numel() ** 0.5 * 4 / PARTS / 12**0.5  # four deviations of a sum of that many rounding errors
        assert abs(float(short[1] - whole[1])) < bound


@pytest.mark.parametrize("text", ["u4/t", "u2/g8", "i8/c1"])
def test_one_kernel_computes_the_same(text, monkeypatch):
    qtype, x, step, offset = case(text, torch.float32, (48, 96))
    g = torch.randn_like(x)
    found = []
    for large in (1 << 60, 1):
        monkeypatch.setattr(fused, "LARGE", large)
        leaves = [t.detach().clone().requires_grad_() for t in (x, step, *([] if offset is None else [offset]))]
        y = fake_quantize(*leaves[:2], leaves[2] if offset is not None else None, qtype, EWGS)
        y.backward(g)
        found.append([y.detach(), *(t.grad for t in leaves)])
    assert not fused._BROKEN
    assert torch.equal(found[0][0], found[1][0])
    for plain, one in zip(*found, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-5)


def test_without_a_compiler_it_says_so_once(monkeypatch):
    def broken(function):
        raise torch._dynamo.exc.TorchDynamoException("no g++")

    monkeypatch.setattr(fused, "_compiled", broken)
    monkeypatch.setattr(fused, "_BROKEN", [])
    monkeypatch.setattr(fused, "LARGE", 1)
    qtype, x, step, offset = case("u4/t", torch.float32)
    with pytest.warns(UserWarning, match=r"operation by operation.*no g\+\+"):
        y = fake_quantize(x, step, offset, qtype, LSQ)
    assert torch.equal(y, fake_quantize(x, step, offset, qtype, LSQ))


def test_dynamic_inputs_pass_the_gradient_on():
    qtype = QType.parse("u4/token")
    x = torch.randn(5, 32, requires_grad=True)
    y = fake_quantize_dynamic(x, qtype)
    g = torch.randn_like(y)
    y.backward(g)
    params = QParams(*affine.choose_dynamic(x.detach(), qtype), qtype)
    assert torch.equal(y.detach(), affine.fake_quantize(x.detach(), params))
    assert torch.equal(x.grad, g)


def test_published_first_steps():
    x = torch.randn(8, 64)
    signed = lsq.start(x, QType.parse("i4/c0"))
    torch.testing.assert_close(signed.scale, 2 * x.abs().mean(1) / 7**0.5)
    positive = lsq.start(x.relu(), QType.parse("u4/t"))
    torch.testing.assert_close(positive.scale, 2 * x.relu().mean() / 15**0.5)
    assert int(positive.zero) == 0
    assert int(lsq.start(x, QType.parse("u4/t")).zero) == 8
    sigma = x.var(1, correction=0).sqrt()
    wide = lsq_plus.start(x, QType.parse("i4/c0"))
    torch.testing.assert_close(wide.scale, torch.maximum(-x.mean(1) + 3 * sigma, x.mean(1) + 3 * sigma) / 7)
    assert float(lsq.start(torch.zeros(4, 8), QType.parse("i4/c0")).scale[0]) == 1


def test_names():
    assert [method_named(m.name) for m in METHODS] == list(METHODS)
    with pytest.raises(QpassError, match=r"method 'lsqq' is not one of lsq.*Did you mean 'lsq"):
        method_named("lsqq")
