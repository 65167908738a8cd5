"""Tokens per second of a Llama-shaped model of half a billion parameters (random weights, bfloat16): qpass and peers.

python tests/benchmarks/decode.py [--write] [--only GLOB ...] [--layers N] [--rounds N] [--new N] [--threads N]

Each variant generates greedily from one prompt of 32 tokens, in turn, every other round in reverse; figures are medians.
A token's time is that of `--new` tokens less that of one (the prompt), so prefill and decode are told apart. The head and
the embedding stay bfloat16 everywhere. Read the ratios of one run, not the tokens per second of two.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import fnmatch
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from qpass.timing import interleaved

sys.path.insert(0, str(Path(__file__).parent))
from minilm import ROOT, markdown, where

PROMPT, VOCABULARY = 32, 32000
BASE = "bf16 eager"
GOALS = {"qpass w4a16": 2.2, "qpass w8a16": 1.7}  # of BASE's tokens a second
COMPILE_S = 20.0


def llama(layers: int = 24, hidden: int = 1024, inner: int = 4096, heads: int = 16) -> nn.Module:
    """A Llama of random weights, the same ones each time: 469 million parameters by default."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048, dtype=torch.bfloat16,
        eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def generate(model: nn.Module, new: int) -> torch.Tensor:
    """Greedy tokens after the prompt, the prompt included: [1, PROMPT + new]."""
    prompt = torch.arange(PROMPT).unsqueeze(0) * 37 % VOCABULARY
    with torch.no_grad():
        return model.generate(prompt, max_new_tokens=new, min_new_tokens=new, do_sample=False)


def ours(scheme: str) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        start = time.perf_counter()
        q = qpass.compile(model, scheme, recipe={"lm_head": None})
        took = time.perf_counter() - start
        generate(q, 2)
        whole = time.perf_counter() - start
        graphs = len(runtime_of(q).records)
        print(
            f"qpass.compile {scheme}: {took:.1f} s, {whole:.1f} s with the first tokens ({graphs} graphs)", flush=True
        )
        q.compile_seconds = took  # type: ignore[assignment]
        return q

    return make


def inductor(model: nn.Module) -> nn.Module:
    model = share(model)
    model.forward = torch.compile(model.forward, dynamic=True)
    return model


def torchao(config: Callable[[], Any], fast: bool) -> Callable[[nn.Module], nn.Module]:
    def make(model: nn.Module) -> nn.Module:
        from torchao.quantization import quantize_

        model = share(model)
        quantize_(model, config(), filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        if fast:
            model.forward = torch.compile(model.forward, dynamic=True)
        return model

    return make


def share(model: nn.Module) -> nn.Module:
    """A copy of a model around the same tensors."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def int4() -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

    return PrototypeInt4WeightOnlyConfig(group_size=128)


def int8() -> Any:
    from torchao.quantization import Int8WeightOnlyConfig

    return Int8WeightOnlyConfig()


VARIANTS = (
    (BASE, lambda model: model),
    ("bf16 inductor", inductor),
    ("torchao int4 weight-only, eager", torchao(int4, fast=False)),
    ("torchao int4 weight-only, inductor", torchao(int4, fast=True)),
    ("torchao int8 weight-only, inductor", torchao(int8, fast=True)),
    ("qpass w4a16", ours("w4a16,solver=rtn")),
    ("qpass w8a16", ours("w8a16,solver=rtn")),
    ("qpass w8a8-dynamic", ours("w8a8-dynamic,solver=rtn")),
    ("qpass w4a8-dynamic", ours("w4a8-dynamic,solver=rtn")),
)


def made(model: nn.Module, globs: list[str]) -> Iterator[tuple[str, nn.Module]]:
    """Each variant that can be made here, warm; the others are named with the reason."""
    for name, make in VARIANTS:
        if not any(fnmatch.fnmatchcase(name, glob) for glob in globs):
            continue
        try:
            built = make(model)
            generate(built, 4)
        except Exception as error:
            if name.startswith("qpass"):
                raise
            print(f"{name}: skipped: {type(error).__name__}: {str(error).splitlines()[0]}"[:200], flush=True)
            continue
        gc.collect()
        yield name, built


def table(seconds: dict[tuple[str, int], float], new: int, compiled: dict[str, float]) -> list[tuple[str, ...]]:
    """Rows of the table: tokens a second while decoding, the ratio to BASE, milliseconds of the prompt, compile time.

    seconds: (variant, tokens made) -> milliseconds, of one token and of `new`.
    """
    rows = [("variant", "tokens/s", f"of {BASE}", "goal", f"prompt of {PROMPT}, ms", "qpass.compile, s")]
    rate = {name: 1e3 * (new - 1) / (seconds[name, new] - seconds[name, 1]) for name, count in seconds if count == new}
    for name, value in rate.items():
        ratio = f"{value / rate[BASE]:.2f}" if BASE in rate else ""
        goal = f"{GOALS[name]:.1f}" if name in GOALS else ""
        took = f"{compiled[name]:.1f}" if name in compiled else ""
        rows.append((name, f"{value:.1f}", ratio, goal, f"{seconds[name, 1]:.0f}", took))
    return rows


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the results")
    parser.add_argument("--only", action="append", metavar="GLOB", help="variants by name; may be repeated")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--new", type=int, default=33, help="tokens to generate")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    options = arguments()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or a variant would go on in eager mode without a word
    torch._dynamo.config.recompile_limit = 64  # for torchao, which compiles each layer's tensors again
    torch.set_num_threads(options.threads)
    print(where(), flush=True)
    models = dict(made(llama(options.layers), options.only or ["*"]))
    calls = {(name, n): lambda m=m, n=n: generate(m, n) for name, m in models.items() for n in (1, options.new)}
    times = interleaved(calls, options.rounds, warm_up=1)
    compiled = {name: m.compile_seconds for name, m in models.items() if hasattr(m, "compile_seconds")}
    text = markdown(table(times, options.new, compiled))
    print(text)
    slow = [name for name, took in compiled.items() if took > COMPILE_S]
    print(f"compile time over {COMPILE_S:.0f} s: {', '.join(slow) or 'none'}")
    if options.write:
        today = datetime.date.today().isoformat()
        target = ROOT / f"tests/benchmarks/results/decode-{today}.md"
        head = f"{options.layers} layers, {options.threads} threads, {options.new} tokens"
        target.write_text("\n\n".join([f"# Decode, {today}", head, where(), text]) + "\n")
        print(f"wrote {target.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
