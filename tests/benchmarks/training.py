"""Quantization-aware training of a byte-level GPT and of small CNNs: what each scheme costs over a float control.

python tests/benchmarks/training.py [--task NAME ...] [--only GLOB ...] [--seeds N] [--method NAME] [--no-distill] [--write]

Every variant starts from the float weights and gets a quarter of the steps that these were trained for: batches, rates and
seeds are the same, and `float` itself gets them too, as the control that increases are over. A variant learns from the labels
and from the control's answers, half and half (--no-distill: labels alone). What is scored is the compiled model, on the
reference backend. Each finished run is kept in the user's cache by what made it, an unfinished one as it was every 25
steps, so that an interrupted benchmark goes on from there. --write keeps the table, and the curves as JSON and, with
matplotlib, PNG.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import hashlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qpass

sys.path.insert(0, str(Path(__file__).parent))
from minilm import markdown, where
from training_curves import plot
from training_tasks import NAMES, Task, tasks

from qpass.backends.native.build import cache_folder
from qpass.files import replacing

ROOT = Path(__file__).resolve().parents[2]
KEPT, WARM, LAST = 25, 10, 0.01  # steps between two looks; of the rise; the last rate, of the first
SOURCES = ("training.py", "training_tasks.py", "byte_gpt.py", "digits_nets.py")


def key(*parts: Any) -> str:
    """Names a run by what it is made of: this benchmark's sources, qpass's training, versions and options."""
    files = [Path(__file__).parent / name for name in SOURCES] + sorted((ROOT / "qpass/qat").rglob("*.py"))
    text = "\n".join([*(path.read_text() for path in files), torch.__version__, sys.version, *map(str, parts)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def rate(step: int, steps: int) -> float:
    """A short rise, then one cosine, in parts of the task's rate."""
    return min((step + 1) / WARM, 0.5 * (1 + math.cos(math.pi * step / steps)) + LAST)


class Run:
    """One training: model, optimizer and curve, on disk every KEPT steps."""

    def __init__(self, task: Task, model: nn.Module, seed: int, name: str, teacher: nn.Module | None) -> None:
        self.task, self.model, self.seed, self.teacher = task, model.train(), seed, teacher
        groups = qpass.qat.param_groups(model, task.lr, task.decay, task.step_lr)
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
        """Writes what is needed to go on, whole or not at all."""
        states = {n: getattr(self, n).state_dict() for n in ("model", "optimizer", "schedule")}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as part:
            torch.save({**states, "curve": self.curve, "step": step}, part)

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

    def _step(self, step: int) -> tuple[float, float]:
        batch = self.task.batch(self.seed, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.task.autocast):
            loss = self.task.loss(self.model, batch, self.teacher)
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


def control(task: Task, seed: int) -> Run:
    """The float model, trained on."""
    run = Run(task, task.start(seed), seed, f"{task.name}-{seed}-float-{key(task.name, seed)}", None)
    run.train()
    return run


def trained(task: Task, scheme: str, seed: int, method: str, teacher: nn.Module | None) -> Run:
    """A variant, trained."""
    calibration = task.calibration()
    t = qpass.prepare_qat(task.start(seed), scheme, calibration[0], calibration, task.recipe, method=method)
    name = f"{task.name}-{seed}-{scheme}-{method}-{key(task.name, seed, scheme, method, teacher is None)}"
    run = Run(task, t, seed, name, teacher)
    run.train()
    return run


def compiled(model: nn.Module) -> nn.Module:
    """What is scored: the integers, on the exact backend."""
    torch._dynamo.reset()
    return qpass.compile(model, backend="reference")


def measure(task: Task, options: argparse.Namespace) -> tuple[list[tuple[str, ...]], dict[str, Any]]:
    """One row a scheme: the mean increase over the control, its spread over the seeds, the goal."""
    sign, curves, scores = (1 if task.lower_is_better else -1), {}, {"float": []}
    wanted = [s for s in task.schemes if not options.only or any(fnmatch.fnmatchcase(s, g) for g in options.only)]
    for seed in range(options.seeds):
        run = control(task, seed)
        base = task.score(run.model)
        before = task.score(task.start(seed).eval())
        scores["float"].append(base)
        print(f"{task.name}, seed {seed}: float {before:.4f}, control {base:.4f} {task.unit}", flush=True)
        curves[f"float-{seed}"] = run.curve
        for scheme in wanted:
            found = trained(task, scheme, seed, options.method, None if options.no_distill else run.model)
            more = sign * (task.score(compiled(found.model)) - base)
            scores.setdefault(scheme, []).append(more)
            curves[f"{scheme}-{seed}"] = found.curve
            print(f"{task.name}, seed {seed}, {scheme}: {more:+.4f} over the control", flush=True)
    rows = [(task.name, f"worse than float, {task.unit}", "spread", "wanted")]
    rows.append(("float", f"{statistics.fmean(scores['float']):.4f} itself", spread(scores["float"]), ""))
    for scheme in wanted:
        goal = task.schemes[scheme]
        mean = statistics.fmean(scores[scheme])
        rows.append((scheme, f"{mean:.4f}", spread(scores[scheme]), "" if goal is None else f"{goal}"))
    return rows, curves


def spread(values: list[float]) -> str:
    """Largest minus smallest."""
    return f"{max(values) - min(values):.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=NAMES, help="may be repeated; all unless given")
    parser.add_argument("--only", action="append", metavar="GLOB", help="schemes; may be repeated")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--method", default="lsq+")
    parser.add_argument("--no-distill", action="store_true", help="learn from labels alone")
    parser.add_argument("--sequences", type=int, default=512, help="of bytes that are scored")
    parser.add_argument("--write", action="store_true", help="keep table and curves; whole runs only")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write keeps whole runs only")
    tables, curves = [], {}
    for task in tasks(options.task or NAMES, options.sequences):
        rows, curves[task.name] = measure(task, options)
        tables.append(markdown(rows))
        print("\n" + tables[-1] + "\n", flush=True)
    if options.write:
        today = datetime.date.today().isoformat()
        folder = ROOT / "tests/benchmarks/results"
        how = f"{where()}; {options.seeds} seeds, {options.method}, {'labels' if options.no_distill else 'distilled'}"
        (folder / f"training-{today}.md").write_text("\n\n".join([f"# Training, {today}", how, *tables]) + "\n")
        (folder / f"training-{today}.json").write_text(json.dumps(curves))
        plot(curves, folder / f"training-{today}.png")


if __name__ == "__main__":
    main()
