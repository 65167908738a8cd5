"""all-MiniLM-L6-v2 under qpass and its peers, in one run: times in turn, accuracy against fp32.

python tests/benchmarks/minilm.py [--accuracy] [--write] [--quick] [--only GLOB ...] [--threads N] [--rounds N]

Every round runs each variant at each shape (three calls, of which the last counts), every other round in reverse, so
that drift falls on all alike; figures are medians. Read the ratios of one run, not milliseconds of two. --accuracy
skips the times.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from qpass.demo import embed, minilm
from qpass.profit import machine
from qpass.texts import docstrings
from qpass.timing import interleaved

sys.path.insert(0, str(Path(__file__).parent))
from variants import INPUTS, PEERS, VARIANTS, made

ROOT = Path(__file__).resolve().parents[2]
SHAPES = ((1, 16), (1, 128), (8, 128), (32, 128))
SCORED, CALIBRATED, TOKENS = 512, 128, 128
BURST = 3  # calls in a turn, of which the last counts
FIRST_CALIBRATED = 600  # texts that are not scored
PACKAGES = ("torch", "transformers", "torchao", "onnxruntime", "openvino", "nncf")
BEGIN, END = "<!-- figures begin: written by tests/benchmarks/minilm.py --write -->\n", "<!-- figures end -->"


class Bench:
    """The model, its texts, and what fp32 makes of them."""

    def __init__(self, quick: bool) -> None:
        assert len(docstrings()) >= FIRST_CALIBRATED + CALIBRATED, "this Python has too few docstrings"
        self.model, batch = minilm()
        self.shapes = SHAPES[:2] if quick else SHAPES
        self.timed = {shape: batch(*shape, 0) for shape in self.shapes}
        self.scored = [batch(32, TOKENS, at) for at in range(0, 64 if quick else SCORED, 32)]
        self.calibration = [batch(8, TOKENS, at) for at in range(FIRST_CALIBRATED, FIRST_CALIBRATED + CALIBRATED, 8)]
        self.wanted = embed(self.model, self.scored)

    def batches(self) -> list[dict[str, torch.Tensor]]:
        """One batch of each shape that will come."""
        return [*self.timed.values(), self.scored[0], self.calibration[0]]

    def sample(self) -> tuple[torch.Tensor, ...]:
        return tuple(self.calibration[0][name] for name in INPUTS)

    def accuracy(self, run) -> tuple[float, float, float]:
        """Mean and least cosine to fp32, share of texts with the same nearest neighbour."""
        rows = []
        for batch in self.scored:
            mask = batch["attention_mask"].unsqueeze(-1).float()
            rows.append(torch.nn.functional.normalize((run(batch) * mask).sum(1) / mask.sum(1), dim=-1))
        found, apart = torch.cat(rows), 2 * torch.eye(len(self.wanted))
        cosine = (found * self.wanted).sum(-1)
        nearest = [(e @ e.T - apart).argmax(1) for e in (found, self.wanted)]
        return float(cosine.mean()), float(cosine.min()), float((nearest[0] == nearest[1]).float().mean())


def ratios(
    times: dict[tuple[str, Any], float], names: list[str], peers: Sequence[str] = PEERS
) -> list[tuple[str, ...]]:
    """Each of ours against the fastest peer at each shape."""
    shapes = list(dict.fromkeys(shape for _, shape in times))
    peers = [name for name in names if name in peers]
    if not peers:
        return []
    best = {shape: min(peers, key=lambda name: times[name, shape]) for shape in shapes}
    rows = [("of the best peer", *(f"{name}" for name in best.values()))]
    for name in names:
        if name.startswith("qpass"):
            rows.append((name, *(f"{times[name, shape] / times[best[shape], shape]:.2f}" for shape in shapes)))
    return rows


def markdown(rows: list[tuple[str, ...]]) -> str:
    head, *body = rows
    lines = [head, ("---",) * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions() -> str:
    found = []
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def where() -> str:
    return f"{machine()}, {os.cpu_count()} cores, Python {platform.python_version()}; {versions()}"


def between(page: str, begin: str, end: str, text: str) -> str:
    """The page with `text` between two marks."""
    before, found, rest = page.partition(begin)
    assert found, f"the page has lost its mark {begin!r}"
    assert end in rest, f"the page has lost its mark {end!r}"
    return f"{before}{begin}{text}{end}{rest.partition(end)[2]}"


def write(tables: list[str]) -> None:
    """A file of results, and the README's table."""
    today = datetime.date.today().isoformat()
    target = ROOT / f"tests/benchmarks/results/minilm-{today}.md"
    target.write_text("\n\n".join([f"# MiniLM, {today}", where(), *tables]) + "\n")
    readme = ROOT / "README.md"
    readme.write_text(between(readme.read_text(), BEGIN, END, f"{tables[0]}\n\n{where()}.\n"))
    print(f"wrote {target.relative_to(ROOT)} and the table of README.md")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--accuracy", action="store_true", help="no times, and of the variants only ours")
    parser.add_argument("--write", action="store_true", help="keep the results, and put the table into the README")
    parser.add_argument("--only", action="append", metavar="GLOB", help="variants by name; may be repeated")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few texts, two shapes: to see that everything runs")
    options = parser.parse_args()
    names = [name for name, _, _, _ in VARIANTS]
    for glob in options.only or ():
        if not fnmatch.filter(names, glob):
            parser.error(f"--only {glob!r} is none of: {', '.join(names)}")
    if options.write and (options.only or options.accuracy or options.quick):
        parser.error("--write keeps whole runs only")
    return options


def main() -> None:
    options = arguments()
    torch._dynamo.config.fail_on_recompile_limit_hit = True  # or a variant would go on in eager mode without a word
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    bench = Bench(options.quick)
    globs = options.only or (["qpass*"] if options.accuracy else ["*"])
    print(where(), flush=True)
    runs = dict(made(bench, lambda name: any(fnmatch.fnmatchcase(name, glob) for glob in globs)))
    scores = {name: bench.accuracy(run) for name, run in runs.items()}
    times = {}
    if not options.accuracy:
        calls = {
            (name, shape): lambda r=run, b=batch: r(b)
            for name, run in runs.items()
            for shape, batch in bench.timed.items()
        }
        times = interleaved(calls, options.rounds, burst=BURST)
    heads = ("ms, median", *(f"{b}x{s}" for b, s in bench.shapes), "cosine mean / min", "same neighbour")
    rows = [heads if times else ("variant", *heads[-2:])]
    for name, (mean, least, same) in scores.items():
        laps = [f"{times[name, shape]:.2f}" for shape in bench.shapes] if times else []
        rows.append((name, *laps, f"{mean:.5f} / {least:.5f}", f"{same:.4f}"))
    tables = [markdown(rows)]
    if times and (compared := ratios(times, list(runs))):
        tables.append(markdown(compared))
    print("\n\n".join(tables))
    if options.write:
        write(tables)


if __name__ == "__main__":
    main()
