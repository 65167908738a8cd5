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


def check(module, name, scheme, backend):
    model, q, inputs = compiled(module, name, scheme, backend)
    assert type(q) is type(model)
    assert not left(q)
    bound = max(CLOSE[scheme], WIDER.get(name, 0) if scheme != "w8a16" else 0)
    for count in (4, 3):
        batch = inputs(count)
        found = run(q, batch)
        assert found.shape == run(model, batch).shape
        assert relative(found, run(model, batch)) < bound


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("name", models_vision.MODELS)
def test_user_networks(name, backend):
    check(models_vision, name, "w8a8", backend)


@pytest.mark.parametrize("name", models_transformers_vision.MODELS)
def test_transformers(name):
    check(models_transformers_vision, name, "w8a8", "cpu")


@pytest.mark.parametrize("scheme", ["w8a8-dynamic", "w8a16", "w4a8"])
@pytest.mark.parametrize("name", ["resnet", "mobilenet-v3", "unet", "sound"])
def test_other_schemes(name, scheme):
    check(models_vision, name, scheme, "cpu")
