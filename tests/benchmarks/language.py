"""A small language model under every scheme and solver: bits per byte, KL to float, top-1 agreement, on held-out source.

python tests/benchmarks/language.py [--only GLOB ...] [--seed N] [--sequences N] [--threads N] [--peers] [--write]

The model (byte_gpt.py) is trained on the first run, in some minutes, and calibrated on 128 sequences of 256 bytes of what it
was trained on. It runs on the reference backend, so that figures are of the weights and of no kernel; its head stays float.
Beside each mean stands its standard error over the sequences, paired with float's. --peers scores other quantizers too, those
that are installed (language_peers.py). --write keeps the table, as it grows.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qpass

sys.path.insert(0, str(Path(__file__).parent))
from byte_gpt import BITS, sequences, source, trained
from language_peers import peers
from minilm import markdown, where

ROOT = Path(__file__).resolve().parents[2]
CALIBRATED, BATCH = 128, 16
POINTS = ("w4a16", "w4a16-g32", "w3a16", "w3a16-g32", "w2a16-g32")
FREE = ("free", "hqq")  # solvers that get no calibration
SOLVERS = (*FREE, "gptq", "descent", "awq", "adaround")
OTHERS = {
    "w4a16-c": ("free", "gptq", "descent"),
    "w8a16": ("free", "gptq"),
    "w8a8-dynamic": ("rtn", "gptq", "smoothquant"),
    "w4a8-dynamic": ("rtn", "gptq", "descent"),
    "w8a8": ("rtn", "gptq", "smoothquant"),
}
Make = Callable[[Any, list[Tensor]], nn.Module]
Score = tuple[float, float, float, float]  # bits a byte above float, its standard error, KL in bits, top-1 agreement


def variants(globs: list[str] | None) -> list[str]:
    """Schemes with a solver, `w4a16,solver=gptq`; `free` and `hqq` are without calibration."""
    names = [f"{point},solver={solver}" for point in POINTS for solver in SOLVERS]
    names += [f"{point},solver={solver}" for point, solvers in OTHERS.items() for solver in solvers]
    return [name for name in names if not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def made(globs: list[str] | None, with_peers: bool) -> Iterator[tuple[str, Make]]:
    """(name, what makes the quantized model of model and calibration) of each variant, and of each peer."""
    for name in variants(globs):
        yield name, lambda model, calibration, name=name: quantized(model, name, calibration)
    if with_peers:
        yield from peers(globs)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    """[sequences, length, bytes], a batch at a time."""
    with torch.no_grad():
        return torch.cat([model(part) for part in tokens[:, :-1].split(BATCH)])


def quantized(model: nn.Module, variant: str, calibration: list[Tensor]) -> nn.Module:
    """The model under a variant; every site but the head is quantized."""
    torch._dynamo.reset()
    free = variant.rpartition("=")[2] in FREE
    scheme = variant.removesuffix(",solver=free")
    plan = qpass.analyze(
        model, scheme, calibration[0], None if free else calibration, {"head": None}
    )  # fmt: skip
    left = [d.site for d in plan if d.operation == "linear" and not d.quantized and d.site != "head:linear.0"]
    assert not left, f"{variant} leaves {left} in float"
    return qpass.compile(model, plan=plan, backend="reference")


def score(found: Tensor, wanted: Tensor, tokens: Tensor) -> Score:
    """What logits are worth, beside float's."""
    mine, theirs = found.log_softmax(-1), wanted.log_softmax(-1)
    right = tokens[:, 1:, None]
    above = (theirs - mine).gather(-1, right).mean((1, 2)) / BITS
    divergence = (theirs.exp() * (theirs - mine)).sum(-1).mean() / BITS
    same = (found.argmax(-1) == wanted.argmax(-1)).float().mean()
    return float(above.mean()), float(above.std() / math.sqrt(len(above))), float(divergence), float(same)


def row(name: str, found: Score, seconds: float) -> tuple[str, ...]:
    above, spread, divergence, same = found
    return (name, f"{above:.4f}", f"{spread:.4f}", f"{divergence:.4f}", f"{100 * same:.2f} %", f"{seconds:.1f}")


def write(text: str, folder: Path) -> Path:
    """Keeps the table in language-YYYY-MM-DD.md of a folder."""
    target = folder / f"language-{datetime.date.today().isoformat()}.md"
    target.write_text(text)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="GLOB", help="schemes with solvers; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the training")
    parser.add_argument("--sequences", type=int, default=512, help="that are scored")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", action="store_true", help="score other quantizers too")
    parser.add_argument("--write", action="store_true", help="keep the results; whole runs only")
    options = parser.parse_args()
    if options.write and options.only:
        parser.error("--write keeps whole runs only")
    torch.set_num_threads(options.threads)
    model, (train, held_out) = trained(options.seed), source()
    calibration = list(sequences(train, CALIBRATED, 1)[:, :-1].split(BATCH))
    tokens = sequences(held_out, options.sequences, 2)
    wanted = logits(model, tokens)
    base = float(F.cross_entropy(wanted.flatten(0, 1), tokens[:, 1:].flatten())) / BITS
    print(f"float: {base:.4f} bits a byte on {options.sequences} sequences", flush=True)
    rows = [("variant", "bits a byte above float", "standard error", "KL, bits", "same top byte", "seconds")]
    head = f"{where()}; seed {options.seed}, reference backend; float {base:.4f} bits a byte"
    try:
        for name, make in made(options.only, options.peers):
            start = time.perf_counter()
            try:
                found = score(logits(make(model, calibration), tokens), wanted, tokens)
            except (Exception, SystemExit) as error:  # a peer may end the process
                if name in variants(None):
                    raise
                rows.append(
                    (name, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:100], "", "", "", "")
                )
            else:
                rows.append(row(name, found, time.perf_counter() - start))
            print("  ".join(f"{cell:>12}" for cell in rows[-1]), flush=True)
            if options.write:
                write(report(head, rows), ROOT / "tests/benchmarks/results")
    except KeyboardInterrupt:
        print("\ninterrupted; the trained model is kept", file=sys.stderr)
        raise SystemExit(130) from None
    print(f"\n{report(head, rows)}")


def report(head: str, rows: list[tuple[str, ...]]) -> str:
    """The results so far."""
    return "\n\n".join([f"# Language model, {datetime.date.today().isoformat()}", head, markdown(rows)]) + "\n"


if __name__ == "__main__":
    main()
