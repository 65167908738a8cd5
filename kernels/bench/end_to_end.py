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

from bench import tables
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
    times: dict[tuple[str, int], float] = {}
    stopped = ""
    for name, make in makers.items():
        by = "torch" if name.startswith("float") else "qpass"
        mine = [Row("decode", 1, name, by, goal=_goal(DECODE, name))]
        mine += [Row("prefill", length, name, by, goal=_goal(PREFILL, name)) for length in lengths]
        rows += mine
        try:
            _measured(make, mine, wanted, times, 8 if dry else PROMPT, device, dry)
        except (timing.Lost, torch.AcceleratorError, KeyboardInterrupt) as error:
            stopped = timing.reason(error)
            for row in mine:
                row.verdict = row.verdict or f"failed: stopped: {stopped}"
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


def _measured(
    make: Callable[[], nn.Module],
    rows: list[Row],
    wanted: dict[tuple[str, int], Tensor],
    times: dict[tuple[str, int], float],
    prompt: int,
    device: torch.device,
    dry: bool,
) -> None:
    """Fills in the rows of one model; the first model's logits and times are what the others are compared with."""
    model, broken = None, ""
    try:
        with torch.no_grad():
            model = make()
    except Exception as error:
        broken = timing.reason(error)
        timing.alive(device)
    for row in rows:
        case = row.case, row.m
        if model is None:
            row.verdict = f"failed: {broken}"
            continue
        try:
            with torch.no_grad():
                step = decode(model, prompt, device) if row.case == "decode" else prefill(model, row.m, device)
                logits, found = _timed(step, device, dry)
            wanted.setdefault(case, logits)
            times.setdefault(case, found.median)
            row.us, row.low, row.high = found.median, found.low, found.high
            row.ratio, row.allowed = times[case] / found.median, FAR
            row.error = float((logits - wanted[case]).norm() / wanted[case].norm())
            row.verdict = _verdict(row)
        except Exception as error:
            row.verdict = f"failed: {timing.reason(error)}"
            timing.alive(device)
    for row in rows:
        print(f"{row.scheme:22} {row.case:8} {row.m:5} {row.us or 0:10.1f} us {row.ratio or 0:6.2f} x  {row.verdict}")


def _timed(step: Step, device: torch.device, dry: bool) -> tuple[Tensor, timing.Times]:
    """(float32 logits of the last token, times of a call)."""
    logits, found = replayed_call(*step, device, dry)
    return logits[:, -1].float(), found


def _goal(goals: dict[str, float], name: str) -> str:
    return f"{goals[name]:.2f} x" if name in goals else ""


def _verdict(row: Row) -> str:
    if not row.error <= row.allowed:
        return "wrong"
    goal = (DECODE if row.case == "decode" else PREFILL).get(row.scheme)
    return "" if goal is None else "met" if row.ratio >= goal else "missed"
