"""Other packages' searches of bits per layer, where they are installed: rows of `searching.py --gpt`, each beside qpass.

A peer takes the model, the batches that qpass measures losses on, the schemes to choose among and averages of nominal bits a
weight; it gives a scheme for each linear of the blocks, at each average. Tables and head stay float. All choices are compiled
by qpass, with the same solver, so that only the choice differs. Beside each: what qpass finds among the same schemes in no
more nominal bits than the peer's choice has (a peer may keep above or below the average).

nncf        3.4: layers in order of a sensitivity, as many in the lower bits as the ratio asks for; 4 and 8 bits alone
modelopt    0.47, `auto_quantize`: gradients of the loss and an integer program, or each layer's KL below one threshold
auto-round  0.16, `AutoScheme`: loss by gradients, dynamic programming; on the twin of transformers (language_peers.py)

Not here: torchao 0.18 has no `autoquant`, and its scripts of mixed precision are for Llama on CUDA; neural-compressor 3.10
tries configurations of a whole model, its search of bits is auto-round's; amd-quark 0.13 chooses between fp8 and float, of
Llama and Qwen alone; aimet-torch 2.42 takes an accuracy to keep, no size; model-compression-toolkit 2.6 traces with torch.fx,
which cannot follow this model, and imports torchvision, whose build on PyPI does not load beside a CPU build of torch.
"""

from __future__ import annotations

import contextlib
import copy
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from byte_gpt import BYTES, LENGTH, ByteGpt
from language_peers import body, twin
from torch import Tensor
from torch.nn import functional as F

from qpass.schemes import Scheme
from qpass.search.candidates import FLOAT
from qpass.search.groups import Group
from qpass.search.program import Values, solve, total

Choice = dict[str, str]  # linear, or group -> scheme
Peer = Callable[[ByteGpt, list[Tensor], Sequence[str], Sequence[float]], list[Choice]]
PAIR, FOUR = ("w4a16", "w8a16"), ("w3a16", "w4a16", "w6a16", "w8a16")
AVERAGES = {PAIR: (6.0, 5.0), FOUR: (5.0, 4.0)}  # nominal bits a weight
SENSITIVITIES = (
    "WEIGHT_QUANTIZATION_ERROR", "HESSIAN_INPUT_ACTIVATION", "MEAN_ACTIVATION_VARIANCE", "MAX_ACTIVATION_VARIANCE",
    "MEAN_ACTIVATION_MAGNITUDE",
)  # fmt: skip
HEAD = ("candidates", "search", "nominal bits", "KL, bits", "of qpass at that size", "of the peer's", "layers alike")


def bits(scheme: str) -> int:
    """Of a code."""
    return Scheme.parse(scheme).weight.bits


def group(scheme: str) -> int | None:
    """Weights that share a scale; None: a channel's."""
    return Scheme.parse(scheme).weight.group


def by_bits(schemes: Sequence[str], found: Mapping[str, int]) -> Choice:
    """Linear -> scheme, of linear -> bits."""
    named = {bits(scheme): scheme for scheme in schemes}
    return {name: named[width] for name, width in found.items()}


def nncf(
    model: ByteGpt, batches: list[Tensor], schemes: Sequence[str], averages: Sequence[float], sensitivity: str
) -> list[Choice]:
    """The ratio is a share of the weights."""
    import nncf as n

    low, high = map(bits, schemes)
    found = []
    for average in averages:
        compressed = n.compress_weights(
            copy.deepcopy(model),
            mode=n.CompressWeightsMode.INT4_ASYM,
            ratio=(high - average) / (high - low),
            group_size=group(schemes[0]),
            all_layers=True,
            ignored_scope=n.IgnoredScope(patterns=[".*head.*", ".*bytes.*", ".*places.*"], validate=False),
            dataset=n.Dataset(batches),
            sensitivity_metric=getattr(n.SensitivityMetric, sensitivity),
        )
        hooks = [(name, type(m).__name__) for name, m in compressed.named_modules() if name.endswith(":weight__0.0")]
        linear = lambda hook: hook.split(".post_hooks.")[1].removesuffix(":weight__0.0").replace(":", ".")
        found.append(
            by_bits(schemes, {linear(hook): int(kind[len("INT")]) for hook, kind in hooks})
        )  # INT4Asymmetric..
    return found


def modelopt(
    model: ByteGpt, batches: list[Tensor], schemes: Sequence[str], averages: Sequence[float], method: str
) -> list[Choice]:
    """Symmetric codes from the largest values. Scores are kept between averages."""
    import modelopt.torch.quantization as mtq

    def form(scheme: str) -> dict[str, Any]:
        size = {"block_sizes": {-1: group(scheme)}} if group(scheme) else {"axis": 0}
        weight = {"quantizer_name": "*weight_quantizer", "cfg": {"num_bits": bits(scheme), **size}}
        return {"quant_cfg": [weight, {"quantizer_name": "*input_quantizer", "enable": False}], "algorithm": "max"}

    loss = lambda out, tokens: F.cross_entropy(out[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    forms, found = [form(scheme) for scheme in schemes], []
    space = {"module_name_patterns": ["blocks.*"], "quantization_formats": forms, "allow_no_quant": False}
    with tempfile.TemporaryDirectory() as folder:
        for average in averages:
            made, _ = mtq.auto_quantize(
                copy.deepcopy(model),
                {"effective_bits": average, "cost": {"excluded_module_name_patterns": ["head"]}},
                forms,
                batches,
                lambda net, tokens: net(tokens),
                loss if method == "gradient" else None,
                disabled_layers=["head"],
                num_calib_steps=1,
                num_score_steps=len(batches),
                method=method,
                module_search_spaces=[space],
                checkpoint=os.path.join(folder, "scores.pt"),
            )
            linears = {name: m for name, m in made.named_modules() if name.startswith("blocks.")}
            widths = {n: m.weight_quantizer.num_bits for n, m in linears.items() if hasattr(m, "weight_quantizer")}
            found.append(by_bits(schemes, widths))
    return found


def auto_round(
    model: ByteGpt, batches: list[Tensor], schemes: Sequence[str], averages: Sequence[float]
) -> list[Choice]:
    """Asymmetric codes but for 8 bits; scales are not counted. Its data come as text, here a letter for each byte."""
    import tokenizers
    import transformers
    from auto_round import AutoScheme
    from auto_round.auto_scheme.gen_auto_scheme import GenScheme
    from auto_round.schemes import QuantizationScheme

    letters = [chr(BYTES + byte) for byte in range(BYTES)]
    words = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({c: i for i, c in enumerate(letters)}, unk_token=letters[0])
    )
    words.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    rows = torch.cat(batches).tolist()
    net = twin(model)
    options = [
        QuantizationScheme(bits=bits(s), group_size=group(s) or -1, sym=bits(s) == 8, act_bits=16) for s in schemes
    ]
    plan = AutoScheme(
        list(averages), options, shared_layers=[["q_proj", "k_proj", "v_proj"]], ignore_scale_zp_bits=True,
        nsamples=len(rows), seqlen=LENGTH, batch_size=8, low_cpu_mem_usage=False,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "rows.json"
        text.write_text(json.dumps(["".join(letters[byte] for byte in row) for row in rows]))
        os.environ["AR_AUTO_SCHEME_CACHE"] = os.path.join(folder, "scores")
        named = [name for name, module in net.named_modules() if body(module, name)]
        found = GenScheme(
            plan, net, named, {}, dataset=str(text), device_map="cpu",
            tokenizer=transformers.PreTrainedTokenizerFast(tokenizer_object=words),
        ).get_layer_config()  # fmt: skip
    own = {"q_proj": "qkv", "out_proj": "out", "fc1": "up", "fc2": "down"}
    parts = lambda name: (name.split(".layers.")[1].split(".")[0], own.get(name.split(".")[-1]))
    return [
        by_bits(schemes, {"blocks.{}.{}".format(*parts(n)): c["bits"] for n, c in at.items() if parts(n)[1]})
        for at in found.values()
    ]


PEERS: tuple[tuple[str, str, Peer, tuple[tuple[str, ...], ...]], ...] = (  # package, how, what chooses, among which
    *(("nncf", name.lower(), partial(nncf, sensitivity=name), (PAIR,)) for name in SENSITIVITIES),
    ("nvidia-modelopt", "gradient", partial(modelopt, method="gradient"), (PAIR, FOUR)),
    ("nvidia-modelopt", "kl_div", partial(modelopt, method="kl_div"), (PAIR, FOUR)),
    ("auto-round", "AutoScheme", auto_round, (PAIR, FOUR)),
)


def choices(model: ByteGpt, batches: list[Tensor]) -> Iterator[tuple[tuple[str, ...], str, Choice | str]]:
    """(candidates, name, choice by linear) of each peer that is installed, at each average; or what went wrong."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("AR_LOG_LEVEL", "WARNING")
    for schemes, averages in AVERAGES.items():
        for package, how, peer, takes in PEERS:
            if schemes not in takes:
                continue
            try:
                name = f"{package} {version(package)} {how}"
                with contextlib.redirect_stdout(sys.stderr):  # their progress
                    found = peer(model, batches, schemes, averages)
            except ImportError as error:
                print(f"{package} {how}: left out, {error}", flush=True)
                continue
            except Exception as error:  # a row says it; the others go on
                found = [f"{type(error).__name__}: {error}".splitlines()[0][:100]]
            yield from ((schemes, name, choice) for choice in found)


def at_size(groups: Sequence[Group], loss: Values, nominal: Values, schemes: Sequence[str], theirs: Choice) -> Choice:
    """What qpass finds among the schemes, in no more nominal bits than a choice by group has."""
    among = [replace(g, takes=(FLOAT,) if theirs[g.name] == FLOAT else tuple(schemes)) for g in groups]
    return solve(among, loss, nominal, total(nominal, theirs))


def rows(
    model: ByteGpt, batches: list[Tensor], groups: Sequence[Group], loss: Values, judge: Callable[[Choice], float]
) -> tuple[list[tuple[str, ...]], list[str]]:
    """(table, misses). judge: KL of a choice by group, compiled by qpass."""
    sizes = {g.name: model.get_submodule(g.name.partition(":")[0]).weight.numel() for g in groups}
    table, misses = [HEAD], []
    for schemes, name, choice in choices(model, batches):
        if isinstance(choice, str):
            table.append((", ".join(schemes), name, choice, *[""] * 4))
            continue
        theirs = {g.name: choice.get(g.name.partition(":")[0], FLOAT) for g in groups}
        nominal = {(g, s): float(sizes[g] * bits(s)) for g in sizes for s in schemes}
        nominal |= {(g, FLOAT): 0.0 for g in sizes}
        mine = at_size(groups, loss, nominal, schemes, theirs)
        searched = [g for g, scheme in theirs.items() if scheme != FLOAT]
        average = total(nominal, theirs) / sum(sizes[g] for g in searched)
        peer, own = judge(theirs), judge(mine)
        alike = sum(mine[g] == theirs[g] for g in searched)
        figures = (f"{average:.2f}", f"{peer:.5f}", f"{own:.5f}", f"{own / peer:.2f}", f"{alike} of {len(searched)}")
        table.append((", ".join(schemes), name, *figures))
        print("  ".join(table[-1]), flush=True)
        if own > peer:
            misses.append(f"{name}, {average:.2f} bits of {', '.join(schemes)}: {own / peer:.3f} of its KL")
    return table, misses
