"""generate() under a monitor: the tokens of the unwatched model, every static input seen at each length of the cache."""

import pytest
import torch

import qpass
from tests.models_generate import build, prompt
from tests.test_generate import BEAM, GREEDY, STATIC, generate


@pytest.mark.parametrize(("name", "ways"), [("qwen2", (GREEDY | STATIC, BEAM)), ("t5", (GREEDY,))])
def test_tokens_are_those_of_the_unwatched_model(name, ways):
    model, inputs = build(name), prompt(name, padded=name != "t5")
    calibration = [inputs | ({"decoder_input_ids": inputs["input_ids"]} if name == "t5" else {})] * 2
    q = qpass.compile(model, "w8a8", calibration[0], calibration, backend="reference")
    plain = [generate(q, inputs, way) for way in ways]
    with qpass.monitor(q, share=None) as m:
        watched = [generate(q, inputs, way) for way in ways]
    for (tokens, logits), (wanted, theirs) in zip(watched, plain, strict=True):
        assert torch.equal(tokens, wanted)
        assert all(torch.equal(a, b) for a, b in zip(logits, theirs, strict=True))
    report = m.report()
    assert m.errors == 0
    assert report.looks == report.calls > 0
    assert all(row.stats.looks for row in report)  # those of an encoder too, which generate() calls by itself
    assert all(row.stats.samples >= 2 * row.stats.looks for row in report)  # two rows a call
