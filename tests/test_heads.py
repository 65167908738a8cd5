"""Output layers and tables of language models: float unless a recipe names them, stored once, read by rows."""

import pytest
import torch
from torch import nn

import qpass
from qpass.errors import QpassError
from qpass.runtime import runtime_of
from tests.models_generate import ALL, build, prompt

HEADS = {"whisper": "proj_out"}
TABLES = {"gpt2": "transformer.wte", "t5": "shared", "whisper": "model.decoder.embed_tokens"}
IDS = torch.randint(3, 128, (2, 9), generator=torch.Generator().manual_seed(0))


def quantized(plan, operation=None):
    return {d.site.partition(":")[0] for d in plan.quantized if operation in (None, d.operation)}


def logits(model, ids=IDS):
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize("name", ALL)
def test_float_by_default(name):
    model = build(name)
    for scheme, recipe in (("w4a16-g32", None), ("w8a16", {"*": "w8a8-dynamic"}), ("w8a16", {"*.*": "w8a16"})):
        plan = qpass.analyze(model, scheme, recipe=recipe)
        head = f"{HEADS.get(name, 'lm_head')}:linear.0"
        assert "an output layer" in plan[head].why
        assert "unless a recipe names it" in plan[f"{TABLES.get(name, 'model.embed_tokens')}:embedding.0"].why
        assert len(plan.quantized) >= 8
        assert not quantized(plan, "embedding")


def test_with_example_inputs_the_plan_is_the_same():
    for name in ("gpt2", "llama"):
        model = build(name)
        plans = [qpass.analyze(model, "w4a16-g32", **given) for given in ({}, dict(example_inputs=prompt(name)))]
        assert quantized(plans[0]) == quantized(plans[1])


# architecture, recipe, quantized beside the layers
ASKED = (
    ("llama", {"lm_head": "w8a16"}, {"lm_head"}),
    ("llama", {"*embed_tokens": "w8a16"}, {"model.embed_tokens"}),
    ("qwen2", {"lm_head": "w8a16"}, {"lm_head", "model.embed_tokens"}),
    ("gemma", {"model.embed*": "w4a16-g32"}, {"lm_head", "model.embed_tokens"}),
    ("gpt2", {"lm_head": "w2a16-c", "*.wpe": "w8a16"}, {"lm_head", "transformer.wte", "transformer.wpe"}),
    ("gemma", {"model.embed*": "w4a16-g32", "lm_head": None}, set()),
)


@pytest.mark.parametrize(("name", "recipe", "more"), ASKED)
def test_asked_for_by_name(name, recipe, more):
    model = build(name)
    q = qpass.compile(model, "w8a16", recipe=recipe, backend="reference")
    plan = runtime_of(q).plan
    layers = quantized(qpass.analyze(model, "w8a16"))
    assert quantized(plan) == layers | more
    torch.testing.assert_close(logits(q), logits_eager(q), rtol=1e-4, atol=1e-4)
    for line in qpass.inspect(q).graph("fused").splitlines():
        assert not ("qpass.dequantize(@" in line and "embed" in line)  # gathered first: never the whole table
    tied = q.get_input_embeddings().weight is not None and model.lm_head.weight is model.get_input_embeddings().weight
    if tied and more:
        head, table = q.lm_head.parametrizations.weight, q.get_input_embeddings().parametrizations.weight
        assert head.original0 is table.original0
        assert head.original1 is table.original1
        assert len({id(packed) for packed in plan.packed.values()}) == len(plan.packed)


def logits_eager(q):
    call, q._compiled_call_impl = q._compiled_call_impl, None
    try:
        return logits(q)
    finally:
        q._compiled_call_impl = call


def test_an_8_bit_table_reads_rows_in_generated_kernels_too(tmp_path):
    recipe = {"lm_head": "w8a16"}
    q = qpass.compile(build("gemma"), "w4a16-g32", recipe=recipe, backend="cpu")
    torch.testing.assert_close(logits(q), logits_eager(q), rtol=1e-3, atol=1e-3)
    assert "aten.embedding(@model.embed_tokens.parametrizations.weight.original0" in qpass.inspect(q).graph("lowered")
    stored = {t.untyped_storage().data_ptr(): t.nbytes for t in q.state_dict().values() if t.shape == (128, 64)}
    assert list(stored.values()) == [128 * 64]
    qpass.save(q, tmp_path / "model")
    torch._dynamo.reset()
    loaded = qpass.load(tmp_path / "model", build("gemma", seed=1))
    assert torch.equal(logits(loaded), logits(q))


def test_every_scheme_of_a_table():
    """The error of a table falls with its bits; types with scales per row, per group, with zero points."""
    model, errors = build("llama"), []
    wanted = logits(model)
    for scheme in ("w2a16-c", "w4a16-g32", "w8a8-dynamic"):
        torch._dynamo.reset()
        recipe = {"*embed_tokens": scheme, "model.layers.*": None}
        q = qpass.compile(model, "w8a16", recipe=recipe, backend="reference")
        assert quantized(runtime_of(q).plan) == {"model.embed_tokens"}
        errors.append(float((logits(q) - wanted).norm() / wanted.norm()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


def test_what_a_table_cannot_have_is_said():
    model = build("llama")
    plan = qpass.analyze(model, "w8a16", recipe={"*embed_tokens": "fp8"})
    assert "tables become integers of 2 to 8 bits; fp8 has other types" in plan["model.embed_tokens:embedding.0"].why
    plan = qpass.analyze(model, "w8a16", recipe={"*embed_tokens": "w4a16"})
    d = plan["model.embed_tokens:embedding.0"]
    assert str(d.weight_type) == "i4/c0"
    assert d.note == "its rows of 64 are no multiple of the group of 128: each row has one scale"
    with pytest.raises(QpassError, match=r"matches no module or site.*embed_tokens"):
        qpass.analyze(model, "w8a16", recipe={"model.embed_token": "w8a16"})


class Own(nn.Module):
    """A language model of no library: a tied table, and positions that are looked up with 4 * width rows."""

    def __init__(self):
        super().__init__()
        self.table, self.place = nn.Embedding(50, 32), nn.Embedding(128, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.out = nn.Linear(32, 50, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids):
        x = self.table(ids) + self.place(torch.arange(ids.shape[1]))
        return self.out(x + self.down(torch.relu(self.up(x))))


@pytest.mark.parametrize("example", [None, torch.randint(0, 50, (2, 7))])
def test_a_tied_linear_is_an_output_layer(example):
    plan = qpass.analyze(Own().eval(), "w8a16", example)
    assert quantized(plan) == {"up", "down"}  # `up` has the shape of the table of positions


def test_tied_storage_stays_tied_when_float():
    for name in ("gpt2", "qwen2", "t5"):
        q = qpass.compile(build(name), "w4a16-g32", backend="reference")
        assert q.lm_head.weight is q.get_input_embeddings().weight
