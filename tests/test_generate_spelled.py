"""The torch.compile spelling of a language model: the tokens of qpass.compile, and the same layers in float."""

import pytest
import torch
from torch import nn

import qpass
from qpass import backend_entry
from qpass.passes.annotate import describe_sites
from qpass.passes.logits import makes_logits
from qpass.sites import SiteNames
from tests.graphs import captured
from tests.models_generate import build, prompt

OPTIONS = {"scheme": "w4a16-g32", "backend": "reference"}
LENGTH = dict(do_sample=False, max_new_tokens=16, min_new_tokens=16, eos_token_id=None)


@pytest.fixture
def plans(monkeypatch):
    """The plans that the backend makes, one a graph."""
    made, plan = [], backend_entry._plan
    monkeypatch.setattr(backend_entry, "_plan", lambda *given: made.append(plan(*given)) or made[-1])
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_model_compile(name, plans):
    q = qpass.compile(build(name), **OPTIONS)
    inputs = prompt(name)
    wanted = q.generate(**inputs, **LENGTH)
    torch._dynamo.reset()
    model = build(name)
    model.compile(backend="qpass", options=OPTIONS)
    assert torch.equal(model.generate(**inputs, **LENGTH), wanted)
    assert 1 <= len(plans) <= 3
    sites = {d.site for d in qpass.inspect(q).plan.quantized}
    assert all({d.site for d in plan.quantized} == sites for plan in plans)  # no head, no table, the same names


def test_torch_compile():
    """Its generate() is that of the module inside, which is not compiled, so tokens are chosen here."""
    model, ids = build("mistral"), prompt("mistral")["input_ids"]
    q = qpass.compile(model, **OPTIONS)
    spelled = torch.compile(model, backend="qpass", options=OPTIONS)
    for _ in range(6):
        with torch.no_grad():
            found, wanted = (m(input_ids=ids, use_cache=False).logits for m in (spelled, q))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
        ids = torch.cat([ids, wanted[:, -1:].argmax(-1)], 1)
    assert float((wanted - model(input_ids=ids[:, :-1], use_cache=False).logits).abs().max()) > 1e-2


def test_a_table_asked_for(plans):
    recipe = {"lm_head": "w8a16"}
    model, ids = build("gemma"), prompt("gemma")["input_ids"]
    q = qpass.compile(model, **OPTIONS, recipe=recipe)
    spelled = torch.compile(model, backend="qpass", options=OPTIONS | {"recipe": recipe})
    with torch.no_grad():
        torch.testing.assert_close(spelled(ids).logits, q(ids).logits, rtol=1e-4, atol=1e-4)
    table, head = (plans[0][name] for name in ("model.embed_tokens:embedding.0", "lm_head:linear.0"))
    assert table.packed is head.packed
    assert str(head.weight_type) == "i8/c0"


class Untied(nn.Module):
    """Logits behind a cast, a factor and tanh; a layer of the same shape that is not the last; positions as wide."""

    def __init__(self, after=True):
        super().__init__()
        self.after = after
        self.table, self.inner, self.out = nn.Embedding(50, 32), nn.Linear(32, 50), nn.Linear(32, 50)
        self.back = nn.Linear(50, 32)

    def forward(self, ids):
        y = self.out(self.back(self.inner(self.table(ids))))
        return torch.tanh(y[:, -1:].double() / 30) * 30 if self.after else y.softmax(-1)


@pytest.mark.parametrize(("after", "wanted"), [(True, {"out:linear.0"}), (False, set())])
def test_logits_are_found_in_the_graph(after, wanted):
    gm, _ = captured(Untied(after).eval(), torch.randint(0, 50, (2, 7)))
    nodes, _ = describe_sites(gm, SiteNames())
    assert makes_logits(nodes) == wanted
