"""One weight for 8, 4 and 2 bits beside weights that are rounded for one width each: bits a byte above float, KL, bytes.

python tests/benchmarks/nested.py [--groups 32 ...] [--seed N] [--sequences N] [--threads N] [--write]

The model, its calibration and what is measured are those of language.py: a byte GPT on the reference backend, its head in
float. `separate` is w8a16, w4a16 and w2a16 with the same groups and the solver of `auto`; `nested` is one model, read at each
width. Its ratio is of the loss increase; of 8 bits, where that is of the size of its standard error, KL says more. --write
keeps the table, as it grows.
"""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass

sys.path.insert(0, str(Path(__file__).parent))
from byte_gpt import BITS, sequences, source, trained
from language import BATCH, CALIBRATED, Score, logits, quantized, score
from minilm import markdown, where

ROOT = Path(__file__).resolve().parents[2]
WIDTHS = (8, 4, 2)
HEAD = (
    "variant",
    "bits",
    "bits a byte above float",
    "standard error",
    "KL, bits",
    "of separate, loss",
    "KL",
    "MB",
    "seconds",
)


def megabytes(model: nn.Module) -> float:
    """Of the packed weights of a compiled model."""
    return sum(t.nbytes for name, t in model.state_dict().items() if ".parametrizations." in name) / 1e6


def row(name: str, bits: int, found: Score, alone: Score | None, size: float, seconds: float) -> tuple[str, ...]:
    """A line of the table. alone: the score of the weights that have this width alone."""
    ratios = ("", "") if alone is None else (f"{found[0] / alone[0]:.2f}", f"{found[2] / alone[2]:.2f}")
    cells = (f"{found[0]:.5f}", f"{found[1]:.5f}", f"{found[2]:.6f}", *ratios)
    return (name, str(bits), *cells, f"{size:.2f}", f"{seconds:.0f}")


def measured(model: nn.Module, calibration: list[Tensor], tokens: Tensor, wanted: Tensor, group: int, widths=WIDTHS):
    """A row for each width of the nested weight, behind that of the weights that have this width alone."""
    start = time.perf_counter()
    together = quantized(model, f"w{{{','.join(map(str, widths))}}}a16-g{group}", calibration)
    spent = time.perf_counter() - start
    for bits in widths:
        qpass.set_bits(together, bits)
        found = score(logits(together, tokens), wanted, tokens)
        start = time.perf_counter()
        single = quantized(model, f"w{bits}a16-g{group}", calibration)
        took = time.perf_counter() - start
        alone = score(logits(single, tokens), wanted, tokens)
        yield row(f"separate g{group}", bits, alone, None, megabytes(single), took)
        yield row(f"nested g{group}", bits, found, alone, megabytes(together), spent)


def report(head: str, rows: list[tuple[str, ...]]) -> str:
    return "\n\n".join([f"# Nested weights, {datetime.date.today().isoformat()}", head, markdown(rows)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--sequences", type=int, default=512, help="that are scored")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="keep the results")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model, (train, held_out) = trained(options.seed), source()
    calibration = list(sequences(train, CALIBRATED, 1)[:, :-1].split(BATCH))
    tokens = sequences(held_out, options.sequences, 2)
    wanted = logits(model, tokens)
    base = float(F.cross_entropy(wanted.flatten(0, 1), tokens[:, 1:].flatten())) / BITS
    head = f"{where()}; seed {options.seed}, {options.sequences} sequences, reference backend; float {base:.4f} bits a byte"
    rows = [HEAD]
    print("  ".join(HEAD), flush=True)
    for group in options.groups:
        for line in measured(model, calibration, tokens, wanted, group):
            rows.append(line)
            print("  ".join(f"{cell:>12}" for cell in line), flush=True)
            if options.write:
                target = ROOT / f"tests/benchmarks/results/nested-{datetime.date.today().isoformat()}.md"
                target.write_text(report(head, rows))


if __name__ == "__main__":
    main()
