"""Models saved as directories: configurations beside the weights, and shards."""

import json

import pytest
import torch
import transformers
from safetensors import safe_open

import qpass
from qpass.shards import INDEX, SINGLE
from tests.models import batches, encoder
from tests.models_transformers import NAMED, causal

LIMIT = 10_000
LLAMA = next(make for name, make, _ in NAMED if name == "llama")


def llama():
    return LLAMA().eval()


def compiled(model=None, x=None):
    x = batches(1)[0] if x is None else x
    return qpass.compile(model or encoder(2), "w8a8-dynamic", x, backend="reference")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


@pytest.fixture
def saved(tmp_path):
    """A directory of several shards, and the model that was saved there."""
    q = qpass.compile(encoder(2), "w8a16", backend="reference")
    qpass.save(q, tmp_path / "out", shard_size=LIMIT)
    return tmp_path / "out", q


@pytest.mark.parametrize("size", [None, LIMIT])
def test_loads_bit_for_bit(tmp_path, size):
    q, x = compiled(), batches(1)[0]
    qpass.save(q, f"{tmp_path / 'out'}/", shard_size=size)
    loaded = qpass.load(tmp_path / "out", encoder(2), backend="reference")
    assert torch.equal(loaded(x), q(x))
    assert loaded.state_dict().keys() == q.state_dict().keys()


def test_shards_keep_to_their_size(saved):
    folder, _ = saved
    files = [name for name in names(folder) if name != INDEX]
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((folder / INDEX).read_text())
    total = 0
    for name in files:
        with safe_open(str(folder / name), "pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        size = sum(t.nbytes for t in held.values())
        assert size <= LIMIT or len(held) == 1
        assert all(index["weight_map"][key] == name for key in held)
        total += size
    assert index["metadata"]["total_size"] == total


def test_a_language_model_keeps_its_configurations(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 0
    q = qpass.compile(model, "w8a16", backend="reference")
    qpass.save(q, f"{tmp_path}/")
    assert names(tmp_path) == ["config.json", "generation_config.json", SINGLE]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == ["LlamaForCausalLM"]
    assert (config.hidden_size, config.vocab_size, config.num_key_value_heads) == (32, 99, 2)
    fresh = transformers.AutoModelForCausalLM.from_config(config).eval()
    loaded = qpass.load(tmp_path, fresh, backend="reference")
    assert loaded.generation_config.max_new_tokens == 7
    assert fresh.generation_config.max_new_tokens != 7
    ids = causal(1, 5)["input_ids"]
    tokens = loaded.generate(ids, do_sample=False)
    assert tokens.shape == (1, 12)
    assert torch.equal(tokens, q.generate(ids, do_sample=False))


def test_other_files_stay_and_an_older_model_goes(saved):
    folder, q = saved
    (folder / "tokenizer.json").write_text("{}")
    qpass.save(q, folder)
    assert names(folder) == [SINGLE, "tokenizer.json"]
    qpass.save(q, folder, shard_size=LIMIT)
    assert SINGLE not in names(folder)
    assert {INDEX, "tokenizer.json"} < set(names(folder))
    qpass.load(folder, encoder(2))
