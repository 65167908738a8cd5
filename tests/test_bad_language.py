"""Bad input to language models: positions and ids beyond the tables, uneven batches and groups, other architectures."""

import pytest
import torch

import qpass
from qpass.errors import QpassError
from tests.models import relative
from tests.models_generate import build, prompt

MORE = dict(do_sample=False, max_new_tokens=30, eos_token_id=None)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_beyond_the_tables(backend):
    """An error as the float model has it, and the model runs on afterwards; a generated kernel would end the process."""
    q = qpass.compile(build("gpt2"), "w8a16", backend=backend, recipe={"*.wpe": "w8a16"})
    ids = torch.randint(3, 128, (2, 600))
    if backend == "reference":  # a graph or two more, for the cache
        with pytest.raises(IndexError, match="out of range"):
            q.generate(input_ids=ids[:, :500], **MORE)
    for wrong in (ids, torch.tensor([[3, 200]] * 2), torch.tensor([[3, -1]] * 2)):
        with pytest.raises(IndexError, match="out of range"):
            q(input_ids=wrong, use_cache=False)
    assert q(input_ids=ids[:, :9], use_cache=False).logits.shape == (2, 9, 128)


def test_calibration_batches_of_different_lengths():
    model = build("llama")
    data = [prompt("llama", batch, length, padded=batch > 1) for batch, length in ((2, 9), (1, 33), (3, 5), (2, 64))]
    wanted = model(**data[3]).logits
    for scheme, bound in (("w8a8", 0.2), ("w4a16-g32", 0.5)):
        torch._dynamo.reset()
        q = qpass.compile(model, scheme, data[0], data, backend="reference")
        mask = data[3]["attention_mask"].bool()
        assert relative(q(**data[3]).logits[mask], wanted[mask]) < bound


def test_groups_that_do_not_divide_a_layer():
    """The layer is named, with the width it has and what it has instead; those that fit keep their groups."""
    plan = qpass.analyze(build("llama"), "w4a16-g64")
    down = plan["model.layers.1.mlp.down_proj:linear.0"]
    assert str(down.weight_type) == "i4/c0"
    assert down.note == "its 96 inputs are no multiple of the group of 64: its weight has a scale for each output"
    assert str(plan["model.layers.1.mlp.up_proj:linear.0"].weight_type) == "u4/g64"
    (line,) = [line for line in str(plan).splitlines() if line.startswith(down.site)]
    assert line.endswith(down.note)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.weight"])
def test_weights_that_are_no_numbers(weight, value):
    model = build("qwen3")
    model.get_parameter(weight).data[3, 5] = value
    with pytest.raises(QpassError, match=rf"{weight} holds NaN or infinity"):
        qpass.compile(model, "w4a16-g32")
    assert model._compiled_call_impl is None


def test_of_another_architecture(tmp_path):
    plan = qpass.analyze(build("gpt2"), "w8a16")
    with pytest.raises(QpassError, match=r"transformer\.h\.0\.attn\.c_attn.*LlamaForCausalLM lacks"):
        qpass.compile(build("llama"), plan=plan)
    qpass.save(qpass.compile(build("gpt2"), plan=plan), tmp_path / "model")
    with pytest.raises(QpassError, match="LlamaForCausalLM"):
        qpass.load(tmp_path / "model", build("llama"))
    plan = qpass.analyze(build("llama"), "w8a16")
    with pytest.raises(QpassError, match=r"model\.layers\.0\.self_attn\.q_proj.*other values"):
        qpass.compile(build("llama", seed=1), plan=plan)
