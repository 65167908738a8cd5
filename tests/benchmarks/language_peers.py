"""Other quantizers on the byte GPT's own weights, where they are installed: what `language.py --peers` scores.

A peer takes the model (or its twin of transformers, `twin`), the bits and group of a point, and the calibration of qpass; it
gives a model of the same call. The head stays float. Two want a tokenizer and a model of transformers: they get a twin, whose
weights are put back, so that all are scored by the same code.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from byte_gpt import BYTES, HEADS, LAYERS, LENGTH, WIDTH, ByteGpt
from torch import Tensor, nn

Peer = Callable[[ByteGpt, str, int, int, list[Tensor]], nn.Module]  # model, scheme, bits, group, calibration
GROUPED = ("w4a16", "w4a16-g32", "w3a16", "w3a16-g32", "w2a16-g32")
OF_ALL = {"w8a16": (8, 0), "w8a8-dynamic": (8, 0), "w4a8-dynamic": (4, 128)}


def bits_and_group(point: str) -> tuple[int, int]:
    """Of a scheme's weight; group 0: a scale for each output."""
    return OF_ALL.get(point) or (int(point[1]), 32 if point.endswith("-g32") else 128)


def body(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear that is quantized."""
    return isinstance(module, nn.Linear) and name not in ("head", "lm_head")


def torchao(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """Asymmetric, from the largest values; no data."""
    from torchao import quantization as ao

    kind = getattr(torch, f"int{bits}")
    if point == "w8a16":
        config: Any = ao.Int8WeightOnlyConfig()
    elif point == "w8a8-dynamic":
        config = ao.Int8DynamicActivationInt8WeightConfig()
    elif point == "w4a8-dynamic":
        config = ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=kind, weight_granularity=ao.PerGroup(group))
    else:
        config = ao.IntxWeightOnlyConfig(kind, ao.PerGroup(group), ao.MappingType.ASYMMETRIC)
    ao.quantize_(model, config, filter_fn=body)
    return model


def hqq(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """Half-quadratic, real zero points; no data."""
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    for name, module in list(model.named_modules()):
        if body(module, name):
            parent, _, own = name.rpartition(".")
            config = BaseQuantizeConfig(nbits=bits, group_size=group or None, axis=1)
            setattr(
                model.get_submodule(parent), own, HQQLinear(module, config, compute_dtype=torch.float32, device="cpu")
            )
    return model


def quanto(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """Groups of 128 alone; no data."""
    from optimum.quanto import freeze, qint4, qint8, quantize

    quantize(model, weights={4: qint4, 8: qint8}[bits], exclude="head")
    freeze(model)
    return model


def nncf(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """Asymmetric, with scale estimation and AWQ on the calibration."""
    import nncf as n

    return n.compress_weights(
        model,
        mode=n.CompressWeightsMode.INT4_ASYM,
        ratio=1.0,
        group_size=group,
        all_layers=True,
        ignored_scope=n.IgnoredScope(patterns=[".*head.*", ".*bytes.*", ".*places.*"], validate=False),
        dataset=n.Dataset(calibration),
        awq=True,
        scale_estimation=True,
    )


def auto_round(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """Block by block, signed gradients, 200 steps each, its default."""
    from auto_round import AutoRound

    rows = torch.cat(calibration)
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in rows.split(8)]
    found = AutoRound(
        twin(model), tokenizer=tokenizer(), bits=bits, group_size=group, sym=False, dataset=batches, iters=200,
        nsamples=len(rows), seqlen=LENGTH, batch_size=8, device_map="cpu",
    ).quantize()  # fmt: skip
    return put_back(found[0], model)


def llm_compressor(model: ByteGpt, point: str, bits: int, group: int, calibration: list[Tensor]) -> nn.Module:
    """GPTQ, asymmetric, in order of execution, its defaults."""
    import transformers
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier

    rows = torch.cat(calibration)
    data = Dataset.from_dict({"input_ids": rows.tolist(), "attention_mask": torch.ones_like(rows).tolist()})
    weights = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": "group", "group_size": group}
    recipe = GPTQModifier(ignore=["lm_head"], config_groups={"all": {"targets": ["Linear"], "weights": weights}})
    with tempfile.TemporaryDirectory() as folder:
        twin(model).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
        oneshot(model=loaded, dataset=data, recipe=recipe, processor=tokenizer(), num_calibration_samples=len(rows),
                max_seq_length=LENGTH)  # fmt: skip
    return put_back(loaded, model)


PEERS: tuple[tuple[str, Peer, tuple[str, ...]], ...] = (
    ("torchao", torchao, (*GROUPED, "w8a16", "w8a8-dynamic", "w4a8-dynamic")),
    ("hqq", hqq, (*GROUPED, "w8a16")),
    ("optimum-quanto", quanto, ("w4a16", "w8a16")),
    ("nncf", nncf, GROUPED[:2]),
    ("llm-compressor gptq", llm_compressor, GROUPED),
    ("auto-round", auto_round, GROUPED),
)


def peers(globs: list[str] | None) -> Iterator[tuple[str, Callable[[ByteGpt, list[Tensor]], nn.Module]]]:
    """(name, what makes it of a model and calibration) of each peer and point; the model is copied."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for peer, make, points in PEERS:
        for point in points:
            name = f"{point}, {peer}"
            if not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs):
                yield (
                    name,
                    lambda m, data, make=make, point=point: make(copy.deepcopy(m), point, *bits_and_group(point), data),
                )


def twin(model: ByteGpt) -> nn.Module:
    """The same function as an OPT of transformers: its q, k and v are linears of their own, whose rows are independent."""
    import transformers

    config = transformers.OPTConfig(
        vocab_size=BYTES, hidden_size=WIDTH, num_hidden_layers=LAYERS, ffn_dim=4 * WIDTH, max_position_embeddings=LENGTH,
        do_layer_norm_before=True, word_embed_proj_dim=WIDTH, dropout=0.0, num_attention_heads=HEADS,
        activation_function="gelu", tie_word_embeddings=False, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    found = transformers.OPTForCausalLM(config).eval().requires_grad_(False)
    decoder = found.model.decoder
    decoder.embed_tokens.weight.copy_(model.bytes.weight)
    decoder.embed_positions.weight[2:].copy_(model.places.weight)
    for block, layer in zip(model.blocks, decoder.layers, strict=True):
        for own, theirs in _pairs(block, layer):
            theirs.load_state_dict(own.state_dict())
        for part, linear in enumerate(_qkv(layer)):
            linear.weight.copy_(block.qkv.weight[part * WIDTH : (part + 1) * WIDTH])
            linear.bias.copy_(block.qkv.bias[part * WIDTH : (part + 1) * WIDTH])
    decoder.final_layer_norm.load_state_dict(model.norm.state_dict())
    found.lm_head.weight.copy_(model.head.weight)
    return found


def put_back(found: nn.Module, model: ByteGpt) -> ByteGpt:
    """The linears of a twin, as the weights of the model they are of."""
    for block, layer in zip(model.blocks, found.model.decoder.layers, strict=True):
        for own, theirs in _pairs(block, layer):
            own.weight.copy_(theirs.weight)
        block.qkv.weight.copy_(torch.cat([linear.weight for linear in _qkv(layer)]))
    return model


def _pairs(block: Any, layer: Any) -> tuple[tuple[nn.Module, nn.Module], ...]:
    norms = ((block.norm_a, layer.self_attn_layer_norm), (block.norm_b, layer.final_layer_norm))
    return (*norms, (block.out, layer.self_attn.out_proj), (block.up, layer.fc1), (block.down, layer.fc2))


def _qkv(layer: Any) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
    return layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj


def tokenizer() -> Any:
    """A token a byte; nobody calls it, but it must be there."""
    import tokenizers
    import transformers

    words = tokenizers.models.WordLevel({f"b{i}": i for i in range(BYTES)}, unk_token="b0")
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer(words), unk_token="b0", pad_token="b0"
    )
