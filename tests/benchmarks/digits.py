"""Three CNNs on handwritten digits under every scheme and option: what each costs in images, of 360, and in dB.

python tests/benchmarks/digits.py [--net NAME ...] [--only GLOB ...] [--seed N] [--threads N] [--write]

The nets are trained on the first run (see digits_nets.py), calibrated on 256 images of the training set and run on the
reference backend, so that figures are of the integers and of no kernel. Two or three images are chance; the columns that
tell schemes apart are the images whose class is another than in float and the SQNR of the logits. --write keeps the table.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import qpass
from qpass.runtime import runtime_of
from qpass.schemes import is_scheme

sys.path.insert(0, str(Path(__file__).parent))
from digits_nets import NETS, digits, trained
from minilm import markdown, where

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = ("w8a8", "w8a8-dynamic", "w4a8", "w4a4", "w8a16", "w4a16")
OPTIONS = (
    *("", "equalize=none", "bias=none", "range=minmax", "range=mse", "range=percentile:99.9"),
    "equalize=none,bias=none,range=minmax,smooth=none,solver=rtn",
)
CALIBRATED, BATCH = 256, 64
SCORED = 90  # images a call; 360 are scored
HEAD = ("scheme", "sites", "accuracy", "right, to float", "class changed", "SQNR dB")
Row = tuple[str, ...]


def variants(globs: list[str] | None) -> list[str]:
    """Schemes with options, as qpass spells them: `w8a8,range=mse`."""
    names = [",".join(filter(None, (scheme, options))) for scheme in SCHEMES for options in OPTIONS]
    return [name for name in names if not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [images, 10]."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(SCORED)])


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """10 log10(sum wanted^2 / sum (found - wanted)^2)."""
    error = float((found.double() - wanted.double()).square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / error) if error else math.inf


def score(found: Tensor, wanted: Tensor, labels: Tensor) -> Row:
    """Accuracy, difference to float in images that are right, images whose class changed, SQNR of the logits."""
    right, right_in_float = (int((out.argmax(1) == labels).sum()) for out in (found, wanted))
    changed = int((found.argmax(1) != wanted.argmax(1)).sum())
    return (f"{right / len(labels):.2%}", f"{right - right_in_float:+d}", str(changed), f"{sqnr(found, wanted):.1f}")


def quantized(model: nn.Module, scheme: str, calibration: tuple[Tensor, ...], images: Tensor) -> tuple[str, Tensor]:
    """(sites quantized of all, logits) of a net under a scheme."""
    torch._dynamo.reset()
    example = images[:SCORED]
    q = qpass.compile(model, scheme, example_inputs=example, calibration=calibration, backend="reference")
    plan = runtime_of(q).plan
    return f"{len(plan.quantized)} of {len(plan)}", logits(q, images)


def rows(name: str, seed: int, schemes: list[str]) -> Iterator[Row]:
    """The head, float's row, and one row a scheme."""
    model = trained(name, seed)
    train_images, _, images, labels = digits()
    calibration = train_images[:CALIBRATED].split(BATCH)
    wanted = logits(model, images)
    yield HEAD
    yield ("float", "", f"{float((wanted.argmax(1) == labels).float().mean()):.2%}", "", "", "")
    for scheme in schemes:
        if not is_scheme(scheme):
            yield (scheme, "not available", "", "", "", "")
            continue
        sites, found = quantized(model, scheme, calibration, images)
        yield (scheme, sites, *score(found, wanted, labels))


def shown(found: Iterator[Row]) -> list[Row]:
    """The rows, each printed as it comes."""
    kept = []
    for row in found:
        print(f"{row[0]:<68}" + "".join(f"{cell:>16}" for cell in row[1:]), flush=True)
        kept.append(row)
    return kept


def write(tables: dict[str, list[Row]], seed: int, folder: Path) -> Path:
    """Keeps the tables in digits-YYYY-MM-DD.md of a folder."""
    today = datetime.date.today().isoformat()
    at = f"{where()}, scikit-learn {importlib.metadata.version('scikit-learn')}; seed {seed}, reference backend"
    parts = [f"# Digits, {today}", at]
    for name, table in tables.items():
        parts += [f"## {name}", markdown(table)]
    target = folder / f"digits-{today}.md"
    target.write_text("\n\n".join(parts) + "\n")
    return target


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", action="append", choices=list(NETS), help="one net; may be repeated")
    parser.add_argument("--only", action="append", metavar="GLOB", help="schemes with options; may be repeated")
    parser.add_argument("--seed", type=int, default=0, help="of the nets' training")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--write", action="store_true", help="keep the results; whole runs only")
    options = parser.parse_args()
    if not variants(options.only):
        parser.error(f"--only matches none of: {', '.join(variants(None))}")
    if options.write and (options.only or options.net):
        parser.error("--write keeps whole runs only")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    tables = {}
    for name in options.net or NETS:
        print(f"\n{name}", flush=True)
        tables[name] = shown(rows(name, options.seed, variants(options.only)))
    if options.write:
        print(f"wrote {write(tables, options.seed, ROOT / 'tests/benchmarks/results').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
