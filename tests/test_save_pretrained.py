"""Directories in the format of compressed-tensors, read by transformers' own loader."""

import json

import pytest
import torch
import transformers
from compressed_tensors.compressors.pack_quantized import pack_to_int32, unpack_from_int32
from safetensors import safe_open

import qpass
from qpass.errors import QpassError
from qpass.interchange.compressed import pack
from qpass.shards import INDEX, SINGLE
from tests.models import encoder, relative

IDS = torch.randint(3, 99, (3, 9), generator=torch.Generator().manual_seed(1))


def llama(dtype=torch.float32, **options):
    sizes = dict(vocab_size=99, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = transformers.LlamaConfig(**sizes, intermediate_size=256, max_position_embeddings=64, **options)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def compiled(model, scheme, recipe=None):
    """With attention in the model's own dtype, as the reader computes it."""
    batch = dict(input_ids=IDS)
    schemes = [scheme, *filter(None, (recipe or {}).values())]
    calibration = [batch] if any(qpass.Scheme.parse(s).needs_calibration for s in schemes) else None
    plan = qpass.analyze(model, scheme, batch, calibration, recipe)
    plan.attention = None
    return qpass.compile(model, plan=plan, backend="reference")


def read(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


STATIC = "w8a8,smooth=none,bias=none"
# scheme, recipe, options of the model
CASES = (
    ("w4a16", None, {}),
    ("w4a16", {"lm_head": None}, {"tie_word_embeddings": True}),
    ("w3a16-g32", {"lm_head": None}, {}),
    ("w4a16-c", None, {}),
    ("w8a16", None, {}),
    ("w8a8-dynamic", {"lm_head": None}, {}),
    ("w8a8-dynamic", {"*mlp*": "w8a16"}, {}),
    ("w4a8-dynamic", None, {}),
    (STATIC, {"lm_head": None}, {}),
    ("w8a8,smooth=none", {"lm_head": None}, {"attention_bias": True, "mlp_bias": True}),
)


@pytest.mark.parametrize(("scheme", "recipe", "options"), CASES)
def test_transformers_reads_it_back(tmp_path, scheme, recipe, options):
    """In a row now and then one code of an input falls to the other side: by less than what quantizing costs."""
    model = llama(**options)
    q = compiled(model, scheme, recipe)
    qpass.save_pretrained(q, tmp_path)
    with torch.no_grad():
        found, wanted, real = read(tmp_path)(IDS).logits, q(IDS).logits, model(IDS).logits
    rows = (found - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    assert rows.median() < 1e-5
    assert relative(found, wanted) < relative(wanted, real)


def test_tokens_are_the_same(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 6
    q = compiled(model, "w4a16")
    qpass.save_pretrained(q, tmp_path)
    reader = read(tmp_path)
    assert reader.generation_config.max_new_tokens == 6
    assert torch.equal(reader.generate(IDS[:1], do_sample=False), q.generate(IDS[:1], do_sample=False))


def test_half_precision_is_equal_to_its_rounding(tmp_path):
    q = compiled(llama(torch.bfloat16), "w4a16")
    qpass.save_pretrained(q, tmp_path)
    reader = read(tmp_path)
    assert reader.dtype is torch.bfloat16
    with torch.no_grad():
        assert relative(reader(IDS).logits, q(IDS).logits) < 0.02


def tensors(folder):
    with safe_open(str(folder / SINGLE), "pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def test_the_layout_of_groups(tmp_path):
    q = compiled(llama(), "w4a16", {"lm_head": None})
    qpass.save_pretrained(q, tmp_path)
    held = tensors(tmp_path)
    own = {k.removeprefix("model.layers.0.mlp.down_proj."): v for k, v in held.items() if "layers.0.mlp.down" in k}
    kinds = {key: (t.dtype, tuple(t.shape)) for key, t in own.items()}
    assert kinds == {
        "weight_packed": (torch.int32, (128, 32)),
        "weight_scale": (torch.float32, (128, 2)),
        "weight_zero_point": (torch.int32, (16, 2)),
        "weight_shape": (torch.int64, (2,)),
    }
    codes = qpass.inspect(q).plan["model.layers.0.mlp.down_proj:linear.0"].packed.data
    assert torch.equal(unpack_from_int32(own["weight_packed"], 4, (128, 256)).int() + 8, codes.int())
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    group = config["config_groups"]["group_0"]
    assert (config["format"], config["ignore"]) == ("pack-quantized", ["lm_head"])
    assert (group["weights"]["strategy"], group["weights"]["group_size"]) == ("group", 128)
    assert group["input_activations"] is None


def test_the_layout_of_static_inputs(tmp_path):
    qpass.save_pretrained(compiled(llama(), STATIC, {"lm_head": STATIC}), tmp_path)
    held = tensors(tmp_path)
    own = {k.removeprefix("lm_head."): v for k, v in held.items() if k.startswith("lm_head.")}
    kinds = {key: (t.dtype, tuple(t.shape)) for key, t in own.items()}
    assert kinds == {
        "weight": (torch.int8, (99, 128)),
        "weight_scale": (torch.float32, (99, 1)),
        "input_scale": (torch.float32, (1,)),
        "input_zero_point": (torch.int8, (1,)),
    }
    acts = json.loads((tmp_path / "config.json").read_text())["quantization_config"]["config_groups"]["group_0"]
    wanted = {"num_bits": 8, "type": "int", "symmetric": False, "strategy": "tensor", "dynamic": False}
    assert wanted.items() <= acts["input_activations"].items()


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_packed_as_the_format_packs_them(bits):
    middle = 2 ** (bits - 1)
    codes = torch.randint(-middle, middle, (5, 37), dtype=torch.int8)
    assert torch.equal(pack(codes, bits), pack_to_int32(codes, bits))
    assert torch.equal(pack(codes.t(), bits).t(), pack_to_int32(codes, bits, packed_dim=0))


def test_shards(tmp_path):
    q = compiled(llama(), "w8a8-dynamic")
    qpass.save_pretrained(q, tmp_path, shard_size=100_000)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert (tmp_path / INDEX).is_file()
    with torch.no_grad():
        found = read(tmp_path)(IDS).logits
        assert ((found - q(IDS).logits).norm(dim=-1) / found.norm(dim=-1)).median() < 1e-5
    qpass.save_pretrained(q, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "generation_config.json",
        SINGLE,
        "tokenizer.json",
    ]


def gpt2():
    config = transformers.GPT2Config(vocab_size=99, n_embd=32, n_layer=1, n_head=4, n_positions=64)
    return transformers.GPT2LMHeadModel(config).eval()


# what the format cannot say, the model, scheme, recipe, what the error says
REFUSED = (
    (
        "factors",
        llama,
        "w8a8",
        None,
        "q_proj:linear.0: the format has no place for the factors of its input.*smooth=none",
    ),
    (
        "bias",
        llama,
        "w8a8,smooth=none",
        None,
        "q_proj:linear.0: the format has no place for its corrected bias, as its",
    ),
    ("floats", llama, "fp8", None, r"q_proj:linear.0: 8-bit floats \(e4m3/c0\) are not written in this format yet"),
    (
        "no nn.Linear",
        gpt2,
        "w8a16",
        {"lm_head": None},
        "c_attn:linear.0: its weight belongs to a Conv1D, and the format",
    ),
    (
        "tied",
        lambda: llama(tie_word_embeddings=True),
        "w8a16",
        {"lm_head": "w8a16"},
        "embed_tokens:embedding.0: its weight belongs to a Embedding, and the format",
    ),
    (
        "zero points beside others",
        llama,
        "w4a16",
        {"lm_head": "w8a16"},
        r"transformers reads weights with zero points \(u4/g128\) only where all are of one type",
    ),
    ("nothing quantized", llama, "w8a16", {"*": None}, "no weight of this LlamaForCausalLM is quantized; use its own"),
    ("no configuration", encoder, "w8a16", None, "this Sequential has no transformers configuration.*use qpass.save"),
)


@pytest.mark.parametrize(("make", "scheme", "recipe", "message"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, make, scheme, recipe, message):
    model = make()
    q = qpass.compile(model, scheme, backend="reference") if make is encoder else compiled(model, scheme, recipe)
    with pytest.raises(QpassError, match=message):
        qpass.save_pretrained(q, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_float_model_is_refused(tmp_path):
    with pytest.raises(QpassError, match="LlamaForCausalLM was not compiled by qpass; compile it first"):
        qpass.save_pretrained(llama(), tmp_path)
