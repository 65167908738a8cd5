"""ResNet-50 and MobileNetV2 on images of 224 x 224: `qpass.compile` beside torch in bfloat16, each call a CUDA graph.

The networks are transformers' architectures with random weights, whose batch norms have seen data. Beside the times stands
how far the logits are from those in float32: random weights leave little between the classes, so read them as a comparison.
"""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import tables
from bench.clocks import replayed_call
from bench.tables import Row
from qpass_kernels import timing

GOAL = 1.5  # times as fast as the compiled bfloat16 network
BATCHES = (32, 64, 128, 256)
FAR = 0.32  # relative error of logits, 10 dB
SEEN = 8  # images of a step that batch norms see, of a batch of calibration
DRY_SIZES = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 1], "num_labels": 10}


def main(folder: Path, device: torch.device, dry: bool) -> int:
    """Measures, writes images.csv and .md, and returns 1 where a result is wrong or the run was stopped."""
    rows: list[Row] = []
    stopped = ""
    try:
        for name in ("resnet50",) if dry else ("resnet50", "mobilenet-v2"):
            _network(name, rows, device, dry)
    except (timing.Lost, torch.AcceleratorError, KeyboardInterrupt) as error:
        stopped = timing.reason(error)
        for row in rows:
            if row.us is None and not row.verdict:
                row.verdict = f"failed: stopped: {stopped}"
    about = tables.machine(device) | ({"stopped": stopped} if stopped else {})
    for path in tables.write(folder, "images", rows, about, dry):
        print(path)
    return int(bool(stopped) or any(row.verdict == "wrong" for row in rows))


class Logits(nn.Module):
    """A classifier of transformers as a function of pixels to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def network(name: str, device: torch.device, dry: bool) -> Logits:
    """The network in float32, seeded, with statistics of data in its batch norms."""
    import transformers as hub

    torch.manual_seed(0)
    if name == "resnet50":
        config = hub.ResNetConfig(**(DRY_SIZES if dry else {"num_labels": 1000}))
        model = hub.ResNetForImageClassification(config)
    else:
        model = hub.MobileNetV2ForImageClassification(hub.MobileNetV2Config(num_labels=1000))
    model = Logits(model.to(device)).train()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5)
                norm.bias.uniform_(-0.5, 0.5)
                norm.momentum = 0.3
        for step in range(2 if dry else 12):
            model(images(SEEN, 1000 + step, device, dry))
    return model.eval().requires_grad_(False)


def images(count: int, seed: int, device: torch.device, dry: bool) -> Tensor:
    """[count, 3, size, size]: low frequencies and a little noise of pixels, zero mean."""
    size, drawn = 32 if dry else 224, torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, size // 16, size // 16, generator=drawn)
    smooth = functional.interpolate(coarse, size=size, mode="bicubic")
    return (smooth + 0.1 * torch.randn(count, 3, size, size, generator=drawn)).to(device)


def quantized(net: Logits, device: torch.device, dry: bool) -> nn.Module:
    """The network by `qpass.compile`, calibrated on images of its own."""
    import qpass

    seen = [images(SEEN, 2000 + step, device, dry) for step in range(2 if dry else 8)]
    plan = qpass.analyze(net, "w8a8", example_inputs=seen[0], calibration=seen)
    if not plan.quantized:
        raise RuntimeError(plan.summary())
    return qpass.compile(net, plan=plan, backend="triton")


def _network(name: str, rows: list[Row], device: torch.device, dry: bool) -> None:
    net = network(name, device, dry)
    narrow = copy.deepcopy(net).to(torch.float16 if dry else torch.bfloat16).to(memory_format=torch.channels_last)
    dtype = next(narrow.parameters()).dtype
    compiled = narrow if dry else torch.compile(narrow, dynamic=False)
    variants: tuple[tuple[str, str, Callable[[], Any], torch.dtype], ...] = (
        ("bf16, torch.compile", "torch", lambda: compiled, dtype),
        ("bf16", "torch", lambda: narrow, dtype),
        ("w8a8", "qpass", lambda: quantized(net, device, dry), torch.float32),
    )
    batches = (2,) if dry else BATCHES
    mine = {
        (label, batch): Row(name, batch, label, by, goal=f"{GOAL:.2f} x" if by == "qpass" else "")
        for label, by, _, _ in variants
        for batch in batches
    }
    rows += mine.values()
    plain: dict[int, float] = {}
    for label, _, make, taken in variants:
        model, broken = None, ""
        try:
            with torch.no_grad():
                model = make()
        except Exception as error:
            broken = timing.reason(error)
            timing.alive(device)
        for batch in batches:
            row = mine[label, batch]
            if model is None:
                row.verdict = f"failed: {broken}"
            else:
                _row(row, model, net, batch, taken, plain, device, dry)
            print(f"{name:14} {batch:4} {label:20} {row.us or 0:10.1f} us {row.ratio or 0:6.2f} x  {row.verdict}")
        torch._dynamo.reset()
        gc.collect()
        timing.alive(device)


def _row(
    row: Row,
    model: nn.Module,
    net: Logits,
    batch: int,
    dtype: torch.dtype,
    plain: dict[int, float],
    device: torch.device,
    dry: bool,
) -> None:
    """Fills a row in: the time, the ratio to the first variant of the batch, the error against float32."""
    pixels = images(batch, 3000, device, dry)
    x = pixels.to(dtype).contiguous(memory_format=torch.channels_last)
    try:
        with torch.no_grad():
            logits, found = replayed_call(lambda: model(x), lambda: None, device, dry)
            wanted = torch.cat([net(part) for part in pixels.split(32)])
        row.us, row.low, row.high = found.median, found.low, found.high
        row.ratio = plain.setdefault(batch, found.median) / found.median
        row.error, row.allowed = float((logits.float() - wanted).norm() / wanted.norm()), FAR
        if not row.error <= row.allowed:
            row.verdict = "wrong"
        elif row.goal:
            row.verdict = "met" if row.ratio >= GOAL else "missed"
    except Exception as error:
        row.verdict = f"failed: {timing.reason(error)}"
        timing.alive(device)
