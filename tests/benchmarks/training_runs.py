"""One training of the training benchmark: batches, optimizer, schedule and curve; kept on disk every 25 steps."""

from __future__ import annotations

import hashlib
import io
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from training_peers import PEERS
from training_tasks import Task

import qpass
from qpass.backends.native.build import cache_folder
from qpass.files import replacing

ROOT = Path(__file__).resolve().parents[2]
FEATURES = 2.0  # weight of what modules give beside the logits'
KEPT, WARM, LAST = 25, 10, 0.01  # steps between two looks; of the rise; the last rate, of the first
SOURCES = ("training_runs.py", "training_tasks.py", "training_peers.py", "byte_gpt.py", "digits_nets.py")


def key(*parts: Any, quantized: bool = True) -> str:
    """Names a run by what it is made of: this benchmark's sources, qpass's training if it has a part, versions, options."""
    files = [Path(__file__).parent / name for name in SOURCES]
    files += sorted((ROOT / "qpass/qat").rglob("*.py")) if quantized else []
    text = "\n".join([*(path.read_text() for path in files), torch.__version__, sys.version, *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rate(step: int, steps: int) -> float:
    """A short rise, then one cosine, in parts of the task's rate."""
    return min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / steps)) + LAST)


class Run:
    """One training: model, optimizer and curve, on disk every KEPT steps."""

    def __init__(
        self, task: Task, model: nn.Module, seed: int, name: str, lr: float, teacher: nn.Module | None
    ) -> None:
        self.task, self.model, self.seed = task, model.train(), seed
        self.distillation = None if teacher is None else qpass.qat.Distillation(model, teacher, task.features, FEATURES)
        groups = _groups(task, model, lr)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95))
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate(step, task.steps))
        self.oscillation = qpass.qat.Oscillation(model)
        self.curve: list[dict[str, float]] = []
        self.path = cache_folder() / "training" / f"{name}.pt"
        self.name = name

    def resume(self) -> int:
        """The step to go on with."""
        try:
            held = torch.load(self.path, weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError):
            return 0
        self.model.load_state_dict(held["model"])
        self.optimizer.load_state_dict(held["optimizer"])
        self.schedule.load_state_dict(held["schedule"])
        self.curve = held["curve"]
        return int(held["step"])

    def keep(self, step: int) -> None:
        """Writes what is needed to go on, whole or not at all; without room for it the training goes on and says so."""
        states = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "schedule")}
        written = io.BytesIO()
        torch.save({**states, "curve": self.curve, "step": step}, written)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as part:
                part.write_bytes(written.getbuffer())
        except OSError as error:
            print(f"  {self.name}: step {step} could not be kept: {error}", file=sys.stderr, flush=True)

    def train(self) -> None:
        """All steps, from where an interrupted run was kept."""
        began, start = self.resume(), time.perf_counter()
        torch.manual_seed(self.seed)
        for step in range(began, self.task.steps):
            loss, share = self._step(step)
            if (step + 1) % KEPT == 0 or step + 1 == self.task.steps:
                self.curve.append({"step": step + 1, "loss": loss, "oscillating": share, **self._steps()})
                self.keep(step + 1)
                spent = time.perf_counter() - start
                left = spent / (step + 1 - began) * (self.task.steps - step - 1)
                print(
                    f"  {self.name}: step {step + 1}, loss {loss:.4f}, {left:.0f} s left", file=sys.stderr, flush=True
                )
        self.model.eval()
        if self.distillation is not None:
            self.distillation.close()

    def _step(self, step: int) -> tuple[float, float]:
        batch = self.task.batch(self.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.task.autocast):
            loss = self.task.loss(self.model, batch, self.distillation)
        self.optimizer.zero_grad()
        loss.backward()
        if self.task.clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.task.clip)
        self.optimizer.step()
        self.schedule.step()
        return float(loss.detach()), self.oscillation.step()

    def _steps(self) -> dict[str, float]:
        """Geometric means of the step sizes of weights and of inputs."""
        found = {"weight": [], "input": []}
        for name, p in self.model.named_parameters():
            if name.endswith("log_step"):
                found["weight" if "weight_quantizer" in name else "input"].append(float(p.detach().mean()))
        return {f"{kind} step": math.exp(statistics.fmean(values)) for kind, values in found.items() if values}


def _groups(task: Task, model: nn.Module, lr: float) -> list[dict[str, Any]]:
    """Steps have their rate, also those that brevitas calls scales."""
    scales = [p for name, p in model.named_parameters() if ".scaling_impl." in name]
    groups = qpass.qat.param_groups(model, lr, task.decay, task.step_lr)
    for group in groups:
        group["params"] = [p for p in group["params"] if all(p is not scale for scale in scales)]
    return [*groups, {"params": scales, "lr": task.step_lr, "weight_decay": 0.0}] if scales else groups


def control(task: Task, seed: int) -> tuple[Run, float]:
    """(the float model, trained on at each rate that a scheme gets, the best of them; its score)."""
    best: tuple[Run, float] | None = None
    for lr in dict.fromkeys((task.lr, *task.rates.values())):
        name = f"{task.name}-{seed}-float-{lr:g}-{key(task.name, seed, quantized=False)}"
        run = Run(task, task.start(seed), seed, name, lr, None)
        run.train()
        score = task.score(run.model)
        print(f"{task.name}, seed {seed}: float at rate {lr:g} {score:.4f} {task.unit}", flush=True)
        if best is None or (score < best[1] if task.lower_is_better else score > best[1]):
            best = run, score
    assert best is not None
    return best


def trained(task: Task, scheme: str, seed: int, method: str, teacher: nn.Module | None, start: str) -> Run | None:
    """A variant, trained; None of a scheme that a peer lacks. start: of qpass' weights."""
    batches = task.calibration()
    if method in PEERS:
        t = PEERS[method](task.start(seed), scheme, batches, task.recipe)
        if t is None:
            return None
    else:
        t = qpass.prepare_qat(task.start(seed), scheme, batches[0], batches, task.recipe, method=method, start=start)
    name = f"{task.name}-{seed}-{scheme}-{method}-{key(task.name, seed, scheme, method, start, teacher is None)}"
    run = Run(task, t, seed, name, task.rates.get(scheme, task.lr), teacher)
    run.train()
    return run
