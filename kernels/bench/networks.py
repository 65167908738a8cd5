"""ResNet-50 and MobileNetV2 on images of 224 x 224: `qpass.compile` beside torch in bfloat16, each call a CUDA graph.

The networks are transformers' architectures with random weights, whose batch norms have seen data. Beside the times stands
how far the logits are from those in float32: random weights leave little between the classes, so read them as a comparison.
"""

from __future__ import annotations

import copy
import gc
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bench import models, tables
from bench.clocks import replayed_call
from bench.tables import Row
from qpass_kernels import timing

GOAL = 1.5  # times as fast as the compiled bfloat16 network
BATCHES = (32, 64, 128, 256)
PLAIN = "bf16, torch.compile"  # what ratios are to
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
        tables.end(rows, f"failed: stopped: {stopped}")
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


def exact(net: Logits, pixels: Tensor) -> Tensor:
    """The logits in float32, which cuDNN does not cut to TensorFloat-32 here."""
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return torch.cat([net(part) for part in pixels.split(32)])


def _network(name: str, rows: list[Row], device: torch.device, dry: bool) -> None:
    net = network(name, device, dry)
    narrow = copy.deepcopy(net).to(torch.float16 if dry else torch.bfloat16).to(memory_format=torch.channels_last)
    dtype = next(narrow.parameters()).dtype
    variants: tuple[tuple[str, str, Callable[[], Any], torch.dtype], ...] = (
        (PLAIN, "torch", lambda: narrow if dry else torch.compile(narrow, dynamic=False), dtype),
        ("bf16", "torch", lambda: narrow, dtype),
        ("w8a8", "qpass", lambda: quantized(net, device, dry), torch.float32),
    )
    pixels = {batch: images(batch, 3000, device, dry) for batch in ((2,) if dry else BATCHES)}
    wanted = {batch: exact(net, x) for batch, x in pixels.items()}
    plain: dict[tuple[str, int], float] = {}
    mine = {
        label: [Row(name, b, label, by, goal=f"{GOAL:.2f} x" if by == "qpass" else "", allowed=FAR) for b in pixels]
        for label, by, _, _ in variants
    }
    rows += [row for held in mine.values() for row in held]
    for label, _, make, taken in variants:

        def run(model: nn.Module, row: Row, taken: torch.dtype = taken) -> tuple[timing.Times, float]:
            x = pixels[row.m].to(taken).contiguous(memory_format=torch.channels_last)
            logits, found = replayed_call(lambda: model(x), lambda: None, device, dry)
            error = models.relative(logits, wanted[row.m])
            row.note = f"SQNR {-20 * math.log10(max(error, 1e-15)):.1f} dB"
            return found, error

        models.measured(make, mine[label], run, plain, label == PLAIN, lambda row: GOAL if row.goal else None, device)
        torch._dynamo.reset()
        gc.collect()
        timing.alive(device)
