"""The Trainer of transformers on prepared models: accumulation, checkpointing of activations, its folders, tied weights."""

import pytest
import torch
import transformers as tf
from safetensors import safe_open

import qpass
from qpass.qat.quantizer import Quantizer
from tests.models import relative
from tests.models_training import prepared

SIZES = dict(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
SIZES |= dict(bos_token_id=1, eos_token_id=2, pad_token_id=0, max_position_embeddings=16)
ROWS = [dict(input_ids=row, labels=row) for row in torch.randint(3, 64, (24, 8)).unbind()]


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=False))


def tied():
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2
    )
    return tf.GPT2LMHeadModel(config)


def trainer(t, folder, steps=4):
    options = tf.TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=1e-2,
        save_steps=2,
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    return tf.Trainer(t, options, train_dataset=ROWS)


@pytest.mark.parametrize(
    ("build", "scheme", "recipe"),
    [(llama, "w4a4", None), (tied, "w3a16-g8", {"lm_head": "w8a16", "*.wte": "w8a16"})],
)
def test_trains_saves_resumes_and_compiles(build, scheme, recipe, tmp_path):
    ids = ROWS[0]["input_ids"][None]
    t = prepared(build(), scheme, dict(input_ids=ids), recipe=recipe)
    t.config.use_cache = False
    steps = {n: p.detach().clone() for n, p in t.named_parameters() if "log_step" in n}
    run = trainer(t, tmp_path)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(0 < loss < 10 for loss in losses)
    now = dict(run.model.named_parameters())
    assert all(not torch.equal(now[name], step) for name, step in steps.items())
    run.save_model(str(tmp_path / "last"))
    with safe_open(tmp_path / "last" / "model.safetensors", "pt") as file:
        names = list(file.keys())
    assert {n for n in names if "log_step" in n} == steps.keys()

    fresh = prepared(build(), scheme, dict(input_ids=ids), recipe=recipe)
    again = trainer(fresh, tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, p in again.model.named_parameters():
        torch.testing.assert_close(p, now[name], msg=name)

    with torch.no_grad():
        wanted = run.model.eval()(ids).logits
    if build is llama:
        layer = run.model.model.layers[0].self_attn
        assert layer.q_proj.used[1] is layer.k_proj.used[1] is layer.v_proj.used[1]
    else:
        assert run.model.lm_head.weight is run.model.transformer.wte.weight
    assert sum(isinstance(m, Quantizer) for m in run.model.modules()) >= 5
    q = qpass.compile(run.model, backend="reference")
    assert relative(q(ids).logits, wanted) < 1e-5
