"""Weights that jump between two codes: counted, damped, frozen."""

import pytest
import torch
from torch import nn

import qpass
from qpass import affine
from qpass.errors import QpassError
from qpass.qat import Oscillation, damping
from qpass.qat.training import trained_plan
from tests.models_training import Outliers


def prepared(scheme="w4a16-c"):
    return qpass.prepare_qat(nn.Sequential(nn.Linear(16, 4)), scheme)


def jump(t, oscillation, count):
    """Moves one weight between two codes, another up and up."""
    step = float(t[0].weight_quantizer.log_step[0].exp())
    shares = []
    for i in range(count):
        with torch.no_grad():
            t[0].weight[0, 0] = step * (1 + i % 2)
            t[0].weight[0, 1] = step * min(i, 7)
        shares.append(oscillation.step())
    return shares


def test_shares():
    t = prepared()
    oscillation = Oscillation(t, momentum=0.1)
    shares = jump(t, oscillation, 8)
    assert shares[0] == 0
    assert shares[-1] == 1 / 64
    state = oscillation.states["0:linear.0.weight"]
    frequency = 0.0
    for moved_back in [0] + [1] * 6:  # the first move is against nothing
        frequency += 0.1 * (moved_back - frequency)
    assert float(state.frequency[0, 0]) == pytest.approx(frequency)
    assert float(state.frequency[0, 1]) == 0


def test_freezing():
    t = prepared()
    oscillation = Oscillation(t, threshold=0.2, momentum=0.1)
    jump(t, oscillation, 12)
    step = float(t[0].weight_quantizer.log_step[0].exp())
    assert float(t[0].weight[0, 0]) / step == pytest.approx(round(float(t[0].weight[0, 0]) / step))
    kept = float(t[0].weight[0, 0])
    with torch.no_grad():
        t[0].weight[0, 0] = 5 * step
    oscillation.step()
    assert float(t[0].weight[0, 0]) == kept
    assert int(oscillation.states["0:linear.0.weight"].frozen.sum()) == 1


@pytest.mark.parametrize("scheme", ["w4a16-c", "w2a16-g16"])
def test_damping_is_the_distance_to_the_codes(scheme):
    t = prepared(scheme)
    quantizer, weight = t[0].weight_quantizer, t[0].weight
    with torch.no_grad():
        weight.mul_(3)
    params = quantizer.params(weight)
    rounded = affine.fake_quantize(weight.detach(), params)
    low, high = (
        affine.dequantize(torch.full(weight.shape, code, dtype=torch.int32), params.scale, params.zero, params.type)
        for code in (params.type.qmin, params.type.qmax)
    )
    loss = damping(t)
    torch.testing.assert_close(loss.detach(), (rounded - weight.detach().clamp(low, high)).square().sum())
    loss.backward()
    inside = (weight > low) & (weight < high)
    torch.testing.assert_close(weight.grad[inside], (2 * (weight - rounded))[inside].detach())
    assert float(weight.grad[~inside].abs().sum()) == 0
    assert quantizer.log_step.grad is None


def test_bad_arguments():
    for options, message in (({"threshold": 2}, "threshold is 2"), ({"momentum": 0}, "momentum is 0")):
        with pytest.raises(QpassError, match=message):
            Oscillation(prepared(), **options)


def test_codes_are_followed_of_what_is_multiplied():
    t = qpass.prepare_qat(Outliers(), "w4a4", torch.randn(4, 6, 32)).train()
    layer = t.block.up
    damping(t).backward()
    assert float(layer.weight.grad.abs().sum()) > 0
    quantizer, oscillation = layer.weight_quantizer, Oscillation(t, threshold=0.5)
    oscillation.step()
    state = oscillation.states[quantizer.site]
    assert torch.equal(state.code, trained_plan(t)["block.up:linear.0"].packed.data.to(torch.int16))
    state.frozen[0, 3], state.frequency[0, 3] = True, 0.9
    layer.weight.data[0, 3] += 3 * float(quantizer.params().scale[0] * quantizer.factor[3])
    oscillation.step()
    again = trained_plan(t)["block.up:linear.0"].packed.data
    assert int(again[0, 3]) == round(float(state.average[0, 3]))
