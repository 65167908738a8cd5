"""Convolutional networks end to end: compiled, close to float, nothing that could be quantized left in float."""

import pytest
import torch

import qpass
from qpass.runtime import runtime_of
from tests import models_transformers_vision, models_vision
from tests.models import relative

CLOSE = {"w8a8": 0.1, "w8a8-dynamic": 0.1, "w8a16": 0.05, "w4a8": 0.6}
# random weights and few channels: the error is far from that of a trained network of usual width
WIDER = {"resnet": 0.3, "efficientnet": 0.3, "mobilenet-v1": 0.3, "mobilenet-v2": 0.3, "regnet": 0.3}


def result(out):
    names = ("logits", "last_hidden_state", "pred_boxes")
    return out if isinstance(out, torch.Tensor) else next(v for n in names if (v := getattr(out, n, None)) is not None)


def run(model, batch):
    with torch.no_grad():
        return result(model(**batch) if isinstance(batch, dict) else model(batch))


def left(q):
    """Sites with a weight that stayed float, with the reason."""
    kinds = ("linear", "conv")
    return {d.site: d.why for d in runtime_of(q).plan if d.operation.startswith(kinds) and not d.quantized}


def compiled(module, name, scheme, backend):
    model, inputs = module.build(name)
    data = [inputs(8) for _ in range(4)] if scheme in ("w8a8", "w4a8") else None
    return model, qpass.compile(model, scheme, inputs(4), data, backend=backend), inputs


def check(model, q, inputs, bound):
    assert type(q) is type(model)
    assert not left(q)
    for count in (4, 3):
        batch = inputs(count)
        found, wanted = run(q, batch), run(model, batch)
        assert found.shape == wanted.shape
        assert relative(found, wanted) < bound


@pytest.mark.parametrize("name", models_vision.MODELS)
def test_user_networks(name):
    """On both backends, by one plan: it says nothing of the backend."""
    model, q, inputs = compiled(models_vision, name, "w8a8", "reference")
    bound = max(CLOSE["w8a8"], WIDER.get(name, 0))
    check(model, q, inputs, bound)
    cpu = qpass.compile(model, plan=runtime_of(q).plan, example_inputs=inputs(4), backend="cpu")
    check(model, cpu, inputs, bound)


@pytest.mark.parametrize("name", models_transformers_vision.MODELS)
def test_transformers(name):
    check(*compiled(models_transformers_vision, name, "w8a8", "cpu"), max(CLOSE["w8a8"], WIDER.get(name, 0)))


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16", "w4a8"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet-v3", "unet", "sound"])
def test_other_schemes(name, scheme):
    bound = max(CLOSE[scheme], WIDER.get(name, 0) if scheme != "w8a16" else 0)
    check(*compiled(models_vision, name, scheme, "cpu"), bound)
