"""A Llama of 8 billion parameters with random weights: one token at a time and prefill, float beside quantized.

Each call is a CUDA graph. A step of decoding always takes the same place in a static cache, which is set back before each
replay, outside of what is timed. The ratio is to the float model as it is; a compiled float model stands beside it.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import models, tables
from bench.clocks import replayed_call
from bench.tables import Row
from qpass_kernels import timing

DECODE = {"w8a8-dynamic": 1.75, "w4a8-dynamic": 2.6, "w4a16": 2.6}  # times as fast as float
PREFILL = {"w8a8-dynamic": 1.55, "fp8": 1.55}
SCHEMES = ("w8a8-dynamic", "w4a8-dynamic", "w4a16", "fp8")
PROMPT, LENGTHS = 512, (2048, 4096, 8192)
SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
SIZES |= {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 16384}
DRY_SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
DRY_SIZES |= {"num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
FAR = 0.9  # relative error of logits; those of unrelated models differ by 1.4
Step = tuple[Callable[[], Tensor], Callable[[], Any]]  # (call that returns logits, what to do before each)


def main(folder: Path, device: torch.device, dry: bool) -> int:
    """Measures, writes end_to_end.csv and .md, and returns 1 where a result is wrong."""
    model = llama(device, DRY_SIZES if dry else SIZES)
    makers: dict[str, Callable[[], nn.Module]] = {"float": lambda: model}
    if not dry:
        makers["float, torch.compile"] = lambda: torch.compile(model, dynamic=False)
    for scheme in SCHEMES:
        makers[scheme] = lambda scheme=scheme: quantized(model, scheme)
    rows: list[Row] = []
    lengths = (16, 24) if dry else LENGTHS
    wanted: dict[tuple[str, int], Tensor] = {}
    plain: dict[tuple[str, int], float] = {}

    def run(model: nn.Module, row: Row) -> tuple[timing.Times, float | None]:
        prompt = 8 if dry else PROMPT
        step = decode(model, prompt, device) if row.case == "decode" else prefill(model, row.m, device)
        logits, found = _timed(step, device, dry)
        case = row.case, row.m
        if row.scheme == "float":
            wanted[case] = logits
        return found, models.relative(logits, wanted[case]) if case in wanted else None

    stopped = ""
    for name, make in makers.items():
        by = "torch" if name.startswith("float") else "qpass"
        mine = [Row("decode", 1, name, by, goal=_goal(DECODE, name), allowed=FAR)]
        mine += [Row("prefill", length, name, by, goal=_goal(PREFILL, name), allowed=FAR) for length in lengths]
        rows += mine
        try:
            models.measured(make, mine, run, plain, name == "float", _asked, device)
        except (timing.Lost, torch.AcceleratorError, KeyboardInterrupt) as error:
            stopped = timing.reason(error)
            tables.end(mine, f"failed: stopped: {stopped}")
            break
        torch._dynamo.reset()
        gc.collect()
        timing.alive(device)
    about = tables.machine(device) | {"parameters": f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion"}
    for path in tables.write(folder, "end_to_end", rows, about | ({"stopped": stopped} if stopped else {}), dry):
        print(path)
    return int(bool(stopped) or any(row.verdict == "wrong" for row in rows))


def quantized(model: nn.Module, scheme: str) -> nn.Module:
    """The model by `qpass.compile`; RuntimeError where nothing of it is quantized, which would be measured as if it were."""
    import qpass

    plan = qpass.analyze(model, scheme)
    if not plan.quantized:
        raise RuntimeError(plan.summary())
    return qpass.compile(model, plan=plan, backend="triton")


def llama(device: torch.device, sizes: dict[str, int]) -> nn.Module:
    """A Llama with random weights, in bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            made = LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=False, attn_implementation="sdpa"))
    finally:
        torch.set_default_dtype(before)
    return made.eval().requires_grad_(False)


def prefill(model: nn.Module, length: int, device: torch.device) -> Step:
    """The logits of the last of `length` tokens."""
    tokens = _tokens(model, length, device)
    return lambda: model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits, lambda: None


def decode(model: nn.Module, prompt: int, device: torch.device) -> Step:
    """The logits of the token after a prompt."""
    from transformers import LlamaForCausalLM, StaticCache

    cache = StaticCache(config=model.config, max_cache_len=2 * prompt)
    named = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
    tokens = _tokens(model, prompt + 1, device)
    model(input_ids=tokens[:, :prompt], use_cache=True, logits_to_keep=1, **{named: cache})

    def back() -> None:
        for layer in cache.layers:
            layer.cumulative_length.fill_(prompt)

    last = tokens[:, prompt:].clone()
    return lambda: model(input_ids=last, use_cache=True, **{named: cache}).logits, back


def _tokens(model: nn.Module, length: int, device: torch.device) -> Tensor:
    drawn = torch.Generator().manual_seed(length)
    return torch.randint(0, model.config.vocab_size, (1, length), generator=drawn).to(device)


def _timed(step: Step, device: torch.device, dry: bool) -> tuple[Tensor, timing.Times]:
    """(float32 logits of the last token, times of a call)."""
    logits, found = replayed_call(*step, device, dry)
    return logits[:, -1].float(), found


def _goal(goals: dict[str, float], name: str) -> str:
    return f"{goals[name]:.2f} x" if name in goals else ""


def _asked(row: Row) -> float | None:
    return (DECODE if row.case == "decode" else PREFILL).get(row.scheme)
