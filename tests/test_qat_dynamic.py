"""Inputs whose rows have steps of their own: the gradient of the clip, its kernel, and that it is lowered as trained."""

import copy

import pytest
import torch
from torch import nn

import qpass
from qpass import affine
from qpass.qat import fused
from qpass.qat.dynamic import fake_quantize_dynamic
from qpass.qat.subgradients.lsq import LSQ
from qpass.qat.subgradients.pact import PACT
from qpass.qparams import QParams
from qpass.qtype import QType

CLIP = 0.6
X = torch.randn(32, 7, 48, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 16))


def clipped_net(scheme="w4a4-dynamic", clips=(0.7, 0.85), **options):
    """A model in training whose clips are not 1."""
    t = qpass.prepare_qat(net(), scheme, X, **options)
    with torch.no_grad():
        for layer, clip in zip((t[0], t[2]), clips, strict=True):
            layer.input_quantizer.log_clip.fill_(clip).log_()
    return t


@pytest.mark.parametrize("text", ["u4/token", "u3/token", "u4/sample"])
def test_the_clip_has_the_gradient_of_a_step(text):
    qtype = QType.parse(text)
    x = torch.randn(4, 6, 32, dtype=torch.float64, requires_grad=True)
    log_clip = torch.tensor(CLIP).log().requires_grad_()
    y = fake_quantize_dynamic(x, qtype, log_clip=log_clip, rule=LSQ)
    g = torch.randn_like(y)
    y.backward(g)
    scale, zero = affine.choose_dynamic(x.detach(), qtype)
    step = scale * log_clip.detach().exp()
    assert torch.equal(y.detach(), affine.fake_quantize(x.detach(), QParams(step, zero, qtype)))
    v = x.detach() / step.double()
    below, above = v + zero <= 0, v + zero >= qtype.qmax
    assert bool(below.any())
    assert bool(above.any())
    assert torch.equal(x.grad, torch.where(below | above, 0.0, g))
    to_step = torch.where(below, -zero.double(), torch.where(above, qtype.qmax - zero.double(), v.round() - v))
    wanted = (g * to_step * step).sum() / (x[0].numel() * qtype.qmax) ** 0.5
    residuals = x.numel() ** 0.5 * 4 / 240 / 12**0.5 * float(step.max())  # kept in a byte each
    assert abs(float(log_clip.grad) - float(wanted)) < residuals / (x[0].numel() * qtype.qmax) ** 0.5


def test_a_clip_of_one_changes_no_value():
    qtype = QType.parse("u4/token")
    assert torch.equal(
        fake_quantize_dynamic(X, qtype, log_clip=torch.zeros(()), rule=LSQ), fake_quantize_dynamic(X, qtype)
    )


def test_one_kernel_computes_the_same(monkeypatch):
    qtype, g = QType.parse("u4/token"), torch.randn_like(X)
    channels = (torch.rand(48) + 0.5, torch.randn(48))
    found = []
    for large in (1 << 60, 1):
        monkeypatch.setattr(fused, "LARGE", large)
        x, log_clip = X.clone().requires_grad_(), torch.tensor(CLIP).log().requires_grad_()
        y = fake_quantize_dynamic(x, qtype, None, channels, log_clip, LSQ, coded=True)
        y.backward(g)
        found.append((y.detach(), y.codes.q, y.codes.step, x.grad, log_clip.grad))
    assert not fused._BROKEN
    for plain, one in zip(*found, strict=True):
        torch.testing.assert_close(one, plain, rtol=1e-4, atol=1e-4)


def test_the_clip_is_learned():
    """Rows of a normal distribution with a few far values: least error has a clip, and gradients of the error find it."""
    x = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    qtype = QType.parse("u3/token")

    def error(log_clip):
        return (fake_quantize_dynamic(x, qtype, log_clip=log_clip, rule=LSQ) - x).square().mean()

    log_clip = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.Adam([log_clip], lr=1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        error(log_clip).backward()
        optimizer.step()
    with torch.no_grad():
        grid = torch.linspace(0.3, 1.2, 91).log()
        least = min(float(error(each)) for each in grid)
        assert float(error(log_clip)) < 1.01 * least
        assert least < 0.9 * float(error(torch.zeros(())))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("scheme", ["w4a4-dynamic", "w8a3-dynamic"])
def test_what_was_trained_is_lowered(scheme, backend):
    t = clipped_net(scheme).eval()
    q = qpass.compile(t, backend=backend)
    types = [str(d.input_type) for d in qpass.inspect(q).plan.quantized]
    bits = scheme[3]
    assert types == [f"u{bits}/token*0.7", f"u{bits}/token*0.85"]
    with torch.no_grad():
        torch.testing.assert_close(q(X), t(X), rtol=1e-4, atol=1e-5)
        unclipped = qpass.compile(clipped_net(scheme, (1.0, 1.0)).eval(), backend=backend)
        assert float((unclipped(X) - t(X)).abs().max()) > 1e-2
    assert "0.7 of the range" in qpass.inspect(q).explain("0")


def test_a_convolution_clips_each_image():
    torch.manual_seed(0)
    images = torch.randn(3, 4, 9, 9)
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    t = qpass.prepare_qat(model, "w4a4-dynamic", images)
    with torch.no_grad():
        t[0].input_quantizer.log_clip.fill_(CLIP).log_()
    t(images).square().sum().backward()
    assert float(t[0].input_quantizer.log_clip.grad.abs()) > 0
    for backend in ("reference", "cpu"):
        q = qpass.compile(t.eval(), backend=backend)
        with torch.no_grad():
            torch.testing.assert_close(q(images), t(images), rtol=1e-4, atol=1e-4)


def test_a_saved_model_keeps_it(tmp_path):
    q = qpass.compile(clipped_net().eval(), backend="reference")
    qpass.save(q, tmp_path / "q.qp")
    again = qpass.load(tmp_path / "q.qp", net().eval(), backend="reference")
    with torch.no_grad():
        assert torch.equal(again(X), q(X))
        assert torch.equal(copy.deepcopy(q)(X), q(X))


def test_checkpoints_hold_it_and_older_ones_have_none():
    t = clipped_net()
    state = t.state_dict()
    other = qpass.prepare_qat(net(), "w4a4-dynamic", X)
    other.load_state_dict(state)
    assert torch.equal(other(X), t(X))
    older = {name: value for name, value in state.items() if not name.endswith("log_clip")}
    other.load_state_dict(older)
    assert other[0].input_quantizer.clip == 1


@pytest.mark.parametrize(("scheme", "method"), [("w4a8-dynamic", "lsq+"), ("w4a4-dynamic", "ste")])
def test_where_nothing_is_clipped(scheme, method):
    t = qpass.prepare_qat(net(), scheme, X, method=method)
    assert t[0].input_quantizer.log_clip is None
    t(X).sum().backward()
    assert str(qpass.inspect(qpass.compile(t.eval(), backend="reference")).plan["0:linear.0"].input_type).endswith(
        "/token"
    )


@pytest.mark.parametrize("scheme", ["w4a4-dynamic", "w4a4"])
def test_a_batch_of_no_rows_has_no_gradient(scheme):
    t = qpass.prepare_qat(net(), scheme, X)
    t(X[:0]).sum().backward()
    assert all(not p.grad.any() for p in t[0].parameters())


def test_pact_looks_at_both_ends():
    """Rows are negative somewhere as far as anyone knows before."""
    t = clipped_net(method="pact")
    assert t[0].input_quantizer.rule is not PACT
    t(X).sum().backward()
    assert float(t[0].input_quantizer.log_clip.grad.abs()) > 0


def test_a_clip_that_broke_names_its_site():
    t = clipped_net().train()
    with torch.no_grad():
        t[2].input_quantizer.log_clip.fill_(float("nan"))
    with pytest.raises(qpass.QpassError, match=r"2:linear\.0\.input.*is nan"):
        t(X)


def test_a_frozen_module_keeps_its_clip():
    model = net().requires_grad_(False)
    model[2].requires_grad_(True)
    t = qpass.prepare_qat(model, "w4a4-dynamic", X)
    assert not t[0].input_quantizer.log_clip.requires_grad
    assert t[2].input_quantizer.log_clip.requires_grad


def test_a_format_without_clips_says_so(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64, vocab_size=64)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)).eval()
    ids = torch.randint(64, (2, 8))
    t = qpass.prepare_qat(model, "w4a4-g32-dynamic", example_inputs=dict(input_ids=ids))
    with torch.no_grad():
        t.model.layers[0].mlp.down_proj.input_quantizer.log_clip.fill_(CLIP).log_()
    q = qpass.compile(t.eval(), backend="reference")
    with pytest.raises(qpass.QpassError, match=r"down_proj.*a clip of 0\.6"):
        qpass.save_pretrained(q, tmp_path / "out")
