"""What the training benchmark trains: a byte-level GPT and a small CNN, each with float weights, batches, a loss and a score.

A task gives float weights to begin with; the same number of steps, of the same batches and rates, goes to every variant of
it, float's own among them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import byte_gpt
import digits_nets
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qpass.qat import Distillation

BATCH_SIZE = 16  # sequences that are scored at once


@dataclass(frozen=True)
class Task:
    """schemes: to train, with the goal each is held to (increase of the score over float's; None: none is set).

    lower_is_better: of the score. rates: of the weights, by scheme, where it is not lr. calibration: batches for the first
    steps. recipe: what stays out. features: globs of the modules whose outputs are distilled. loss: of model, batch and the
    distillation from the control, if there is one.
    """

    name: str
    unit: str
    schemes: dict[str, float | None]
    steps: int
    lr: float
    step_lr: float
    decay: float
    clip: float | None
    autocast: bool
    recipe: dict[str, Any]
    features: tuple[str, ...]
    start: Callable[[int], nn.Module]
    calibration: Callable[[], list[Tensor]]
    batch: Callable[[int, int], Any]
    loss: Callable[[nn.Module, Any, Distillation | None], Tensor]
    score: Callable[[nn.Module], float]
    lower_is_better: bool
    rates: dict[str, float] = field(default_factory=dict)


def _gpt_loss(model: nn.Module, tokens: Tensor, distillation: Distillation | None) -> Tensor:
    logits = model(tokens[:, :-1])
    own = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return own if distillation is None else 0.5 * own + 0.5 * distillation(logits, tokens[:, :-1])


def gpt(sequences: int) -> Task:
    """The byte-level GPT, its head in float, for a quarter of the steps it had; bits a byte on held-out source."""
    train, held_out = byte_gpt.source()
    test = byte_gpt.sequences(held_out, sequences, 2)

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            sums = [float(byte_gpt.loss(model, part)) * len(part) for part in test.split(BATCH_SIZE)]
        return sum(sums) / len(test) / byte_gpt.BITS

    return Task(
        name="gpt",
        unit="bits a byte",
        schemes={"w4a8-dynamic": 0.003, "w4a4": 0.020, "w4a4-dynamic": 0.020, "w3a16": 0.006, "w2a16-g32": 0.025,
                 "w2a8-g32-dynamic": 0.045},
        steps=byte_gpt.STEPS // 4, lr=1e-3, step_lr=3e-2, decay=byte_gpt.DECAY, clip=1.0, autocast=True,
        recipe={"head": None}, features=("blocks.?",),
        start=lambda seed: byte_gpt.trained(seed).requires_grad_(True),
        calibration=lambda: list(byte_gpt.sequences(train, 128, 1)[:, :-1].split(BATCH_SIZE)),
        batch=lambda seed, step: byte_gpt.sequences(train, byte_gpt.BATCH, 10_000_000 * (seed + 1) + step),
        loss=_gpt_loss, score=score, lower_is_better=True, rates={"w4a4": 2e-3, "w4a4-dynamic": 2e-3},
    )  # fmt: skip


def _digits_loss(model: nn.Module, batch: tuple[Tensor, Tensor], distillation: Distillation | None) -> Tensor:
    images, labels = batch
    logits = model(images)
    own = F.cross_entropy(logits, labels, label_smoothing=digits_nets.SMOOTHING)
    return own if distillation is None else 0.5 * own + 0.5 * distillation(logits, images)


def digits(net: str) -> Task:
    """A CNN of digits_nets, for a quarter of its epochs; first and last layer in 8 bits, as papers do; percent right."""
    images, labels, test_images, test_labels = digits_nets.digits()
    steps = digits_nets.EPOCHS * (len(images) // digits_nets.BATCH) // 4

    def batch(seed: int, step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1_000_000 * (seed + 1) + step)
        chosen = torch.randint(len(images), (digits_nets.BATCH,), generator=generator)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1_000_000 * (seed + 1) + step)
            return digits_nets.shifted(images[chosen]), labels[chosen]

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            return 100 * float((model(test_images).argmax(1) == test_labels).float().mean())

    schemes = {"w4a8": 0.0, "w4a4": 0.1, "w3a16": 0.0, "w2a16": 0.2, "w2a8": 0.3, "w2a2": 1.0}
    high = 2 * digits_nets.RATE  # best of .25, .5, 1, 2 for few bits, by seeds 3 to 8, which no table shows
    layers = [p for p, m in digits_nets.NETS[net]().named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    return Task(
        name=f"digits-{net}",
        unit="percent right",
        schemes=schemes, steps=steps, lr=digits_nets.RATE / 2, step_lr=high, decay=digits_nets.DECAY, clip=None,
        autocast=False,
        recipe=dict.fromkeys((layers[0], layers[-1]), "w8a8"), features=("[0-9]", "[0-9][0-9]"),
        start=lambda seed: digits_nets.trained(net, seed),
        calibration=lambda: list(images[:256].split(digits_nets.BATCH)),
        batch=batch, loss=_digits_loss, score=score, lower_is_better=False, rates=dict.fromkeys(schemes, high),
    )  # fmt: skip


def tasks(names: Iterable[str], sequences: int) -> list[Task]:
    """The tasks of NAMES asked for."""
    return [gpt(sequences) if name == "gpt" else digits(name.removeprefix("digits-")) for name in names]


NAMES = ("gpt", *(f"digits-{net}" for net in digits_nets.NETS))
