"""What goes wrong before, in and after a training: the site is named, and what to do."""

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.qat.training import near_codes
from qpass.qparams import QParams
from qpass.qtype import QType


def net():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8))


def prepared(scheme="w4a4", **options):
    return qpass.prepare_qat(net(), scheme, torch.randn(8, 16), **options)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("w1a4", "2 to 8"),
        ("w9a4", "2 to 8"),
        ("w4a1", "2 to 8"),
        ("w4a12", "2 to 8"),
        ("fp8", "floats of 8 bits, which have no step to train"),
        ("w4b4", "not known"),
    ],
)
def test_bits_out_of_range(scheme, message):
    with pytest.raises(QpassError, match=message):
        prepared(scheme)


def test_inputs_have_no_first_steps_without_data():
    with pytest.raises(QpassError, match=r"pass example_inputs=batch.*'w4a4-dynamic' needs none"):
        qpass.prepare_qat(net(), "w4a4")
    qpass.prepare_qat(net(), "w4a4-dynamic")


def test_nothing_to_train():
    with pytest.raises(QpassError, match=r"no parameter requires a gradient; call model.requires_grad_\(True\)"):
        qpass.prepare_qat(net().requires_grad_(False), "w4a16")
    with pytest.raises(QpassError, match="no linear or convolution"):
        qpass.prepare_qat(nn.Sequential(nn.LayerNorm(16)), "w4a16", torch.randn(2, 16))
    with pytest.raises(QpassError, match=r"(?s)no site of this Sequential is fake-quantized.*the recipe leaves it"):
        qpass.prepare_qat(net(), "w4a16", recipe={"*": None})


def test_other_arguments():
    with pytest.raises(QpassError, match=r"expected a torch.nn.Module"):
        qpass.prepare_qat("model", "w4a4")
    with pytest.raises(
        QpassError, match=r"start 'round' is not one of auto, rounded, steps, published. Did you mean 'rounded'"
    ):
        prepared(start="round")
    with pytest.raises(QpassError, match="recipe: 'body' matches no module"):
        prepared(recipe={"body": None})
    with pytest.raises(QpassError, match=r"example_inputs.*Sequential.forward raised"):
        qpass.prepare_qat(net(), "w4a4", torch.randn(8, 15))


def test_a_step_that_breaks_is_named():
    t = prepared()
    for value, shown in ((-torch.inf, "0.0"), (torch.nan, "nan"), (torch.inf, "inf")):
        with torch.no_grad():
            t[2].weight_quantizer.log_step[0] = value
        with pytest.raises(QpassError, match=rf"2:linear.0.weight: its step is {shown}. The training diverged"):
            t(torch.randn(4, 16))
    t.eval()
    with pytest.raises(QpassError, match=r"2.weight_quantizer.log_step holds NaN or infinity"):
        qpass.compile(t)


def test_a_loss_of_nan_is_found_in_the_next_call():
    t = prepared()
    optimizer = torch.optim.SGD(qpass.qat.param_groups(t, 1e-3))
    (t(torch.randn(4, 16)).sum() * torch.nan).backward()
    optimizer.step()
    with pytest.raises(QpassError, match=r"0:linear.0.(input|weight): its step is nan"):
        t(torch.randn(4, 16))


def test_schemes_do_not_change_in_training():
    t = prepared()
    with pytest.raises(QpassError, match=r"prepared for w4a4.* already.*float_model"):
        qpass.prepare_qat(t, "w8a8", torch.randn(8, 16))
    with pytest.raises(QpassError, match="compiled as it was trained: pass neither scheme"):
        qpass.compile(t.eval(), scheme="w8a8-dynamic")
    with pytest.raises(QpassError, match="checkpoint nor plan"):
        qpass.compile(t, plan=qpass.analyze(net().eval(), "w8a16"))
    with pytest.raises(QpassError, match="compiled as it was trained: pass neither scheme"):
        qpass.analyze(t, "w8a8")
    qpass.prepare_qat(qpass.qat.float_model(t), "w8a8", torch.randn(8, 16))


def test_training_mode_is_no_mode_to_compile_in():
    with pytest.raises(QpassError, match="training mode"):
        qpass.compile(prepared().train())


def test_checkpoints_of_another_scheme():
    state = prepared("w3a4").state_dict()
    with pytest.raises(QpassError, match=r"0:linear.0.weight: the checkpoint's type is i3/c0, this model.*for i4/c0"):
        prepared("w4a4").load_state_dict(state)
    with pytest.raises(RuntimeError, match="weight_quantizer"):
        prepared("w4a4").load_state_dict(net().state_dict())
    prepared("w4a4").load_state_dict(net().state_dict(), strict=False)


def test_a_frozen_module_keeps_its_steps():
    model = net()
    model[0].requires_grad_(False)
    t = qpass.prepare_qat(model, "w4a4", torch.randn(8, 16))
    assert not any(p.requires_grad for p in t[0].parameters())
    assert all(p.requires_grad for p in t[2].parameters())
    t(torch.randn(4, 16)).sum().backward()
    assert t[0].weight_quantizer.log_step.grad is None
    assert relative_to_compiled(t) < 1e-5


def relative_to_compiled(t):
    x = torch.randn(8, 16)
    with torch.no_grad():
        wanted = t.eval()(x)
    return float((qpass.compile(t, backend="reference")(x) - wanted).norm() / wanted.norm())


def test_writes_in_place_to_a_quantized_weight():
    t = prepared()
    with torch.no_grad():
        t[0].weight.mul_(0.5)
        t[2].weight.clamp_(-0.1, 0.1)
    assert relative_to_compiled(t) < 1e-5
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        t[0].weight.mul_(0.5)


def test_one_parameter_with_two_types():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model[2].weight = model[0].weight
    with pytest.raises(QpassError, match=r"2.* and 0.* read one parameter, '0.weight'.*the same scheme, or untie"):
        qpass.prepare_qat(model, "w4a4", torch.randn(8, 16), recipe={"2": "w8a8"})
    t = qpass.prepare_qat(model, "w4a4", torch.randn(8, 16))
    assert t[0].used[0] is t[2].used[0]
    assert relative_to_compiled(t) < 1e-5


def test_a_module_that_is_gone():
    t = prepared()
    t[2] = nn.Linear(32, 8)
    with pytest.raises(QpassError, match=r"2:linear.0.*its module is there no more"):
        qpass.compile(t.eval())


def test_weights_start_inside_the_range_of_their_codes():
    qtype = QType.parse("i4/c0")
    params = QParams(torch.tensor([0.1, 0.2]), None, qtype)
    weight = torch.tensor([[0.0, 0.149, 9.0], [0.1, -0.31, 0.3]])
    codes = torch.tensor([[0, 2, 7], [1, -2, 1]], dtype=torch.int8)
    moved = near_codes(weight, codes, params)
    assert torch.equal(torch.round(moved / params.scale[:, None]).to(torch.int8), codes)
    assert float(moved[0, 0]) == 0
    assert float((moved / params.scale[:, None] - codes).abs().max()) <= 0.4501
