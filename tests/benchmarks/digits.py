"""Three CNNs on handwritten digits under every scheme and option: what each costs in images, of 360, and in dB.

python tests/benchmarks/digits.py [--net NAME ...] [--only GLOB ...] [--seed N] [--threads N] [--write]

The nets are trained on the first run (see digits_nets.py), calibrated on 256 images of the training set and run on the
reference backend, so that figures are of the integers and of no kernel. Two or three images are chance; the columns that
tell schemes apart are the images whose class is another than in float and the SQNR of the logits. Options that a scheme
does not read are left out. `ends=w8a8` is no option of qpass: a recipe gives the first and the last layer that scheme, as
papers on 4 bits do. --write keeps the table; a whole run takes a quarter of an hour on one core.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib.metadata
import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import qpass
from qpass.runtime import runtime_of
from qpass.schemes import Scheme

sys.path.insert(0, str(Path(__file__).parent))
from digits_nets import NETS, digits, trained
from minilm import markdown, where

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = ("w8a8", "w8a8-dynamic", "w4a8", "w4a8-dynamic", "w4a4", "w8a16", "w4a16")
ENDS = "ends=w8a8"
PLAIN = "equalize=none,bias=none,range=minmax,smooth=none,solver=rtn"
WITH_INTEGER_INPUTS = ("equalize=none", "bias=none")
STATIC = ("range=minmax", "range=mse", "range=percentile:99.9")
CALIBRATED, BATCH = 256, 64
SCORED = 90  # images a call; 360 are scored
Score = tuple[int, int, float]  # images that are right, images whose class is not float's, SQNR of the logits in dB


def options_of(scheme: Scheme) -> tuple[str, ...]:
    """The options that change something under a scheme, then all that is simple at once."""
    wide = scheme.activation is None or scheme.activation.bits == 8
    ends = () if wide else (ENDS,)
    inputs = () if scheme.activation is None else WITH_INTEGER_INPUTS
    return ("", *ends, *inputs, *(STATIC if scheme.needs_calibration else ()), PLAIN)


def variants(globs: list[str] | None) -> list[str]:
    """Schemes with options, as qpass spells them: `w8a8,range=mse`."""
    names = [f"{name},{more}".strip(",") for name in SCHEMES for more in options_of(Scheme.parse(name))]
    return [name for name in names if not globs or any(fnmatch.fnmatchcase(name, glob) for glob in globs)]


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Outputs [images, 10]."""
    with torch.no_grad():
        return torch.cat([model(batch) for batch in images.split(SCORED)])


def sqnr(found: Tensor, wanted: Tensor) -> float:
    """10 log10(sum wanted^2 / sum (found - wanted)^2)."""
    error = float((found.double() - wanted.double()).square().sum())
    return 10 * math.log10(float(wanted.double().square().sum()) / error) if error else math.inf


def score(found: Tensor, wanted: Tensor, labels: Tensor) -> Score:
    """What logits are worth, beside those of float."""
    classes = found.argmax(1)
    return int((classes == labels).sum()), int((classes != wanted.argmax(1)).sum()), sqnr(found, wanted)


def ends(model: nn.Module) -> tuple[str, str]:
    """The paths of the first and the last layer with a weight."""
    found = [path for path, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return found[0], found[-1]


def quantized(model: nn.Module, variant: str, calibration: tuple[Tensor, ...], images: Tensor) -> Tensor:
    """Logits of a net under a variant; every site of it is quantized."""
    torch._dynamo.reset()
    recipe = dict.fromkeys(ends(model), "w8a8") if variant.endswith(ENDS) else None
    scheme = variant.removesuffix(ENDS).rstrip(",")
    q = qpass.compile(model, scheme, images[:SCORED], calibration, recipe, backend="reference")
    left = [d.site for d in runtime_of(q).plan if not d.quantized and not d.is_output]
    assert not left, f"{variant} leaves {left} in float"
    return logits(q, images)


class Bench:
    """The nets, the images, and what float makes of them."""

    def __init__(self, names: list[str], seed: int) -> None:
        train_images, _, self.images, self.labels = digits()
        self.calibration = train_images[:CALIBRATED].split(BATCH)
        self.nets = {name: trained(name, seed) for name in names}
        self.wanted = {name: logits(net, self.images) for name, net in self.nets.items()}

    def scores(self, variant: str) -> dict[str, Score]:
        """Net -> score; `float` is a variant too. Each is printed as it comes."""
        found = {}
        for name, net in self.nets.items():
            start, wanted = time.perf_counter(), self.wanted[name]
            out = wanted if variant == "float" else quantized(net, variant, self.calibration, self.images)
            found[name] = score(out, wanted, self.labels)
            right, changed, db = found[name]
            seconds = time.perf_counter() - start
            print(
                f"{variant:<74}{name:<11}{right:>4} right {changed:>4} changed {db:>6.1f} dB {seconds:>6.1f} s",
                flush=True,
            )
        return found


def table(scores: dict[str, dict[str, Score]]) -> list[tuple[str, ...]]:
    """One row a variant; of each net the images that are right, those whose class changed, and the SQNR."""
    nets = list(next(iter(scores.values())))
    rows = [("of 360 images", *(f"{net}: {what}" for net in nets for what in ("right", "changed", "SQNR dB")))]
    for variant, found in scores.items():
        cells = [cell for right, changed, db in found.values() for cell in (str(right), str(changed), f"{db:.1f}")]
        rows.append((variant, *cells))
    return rows


def write(rows: list[tuple[str, ...]], seed: int, folder: Path) -> Path:
    """Keeps the table in digits-YYYY-MM-DD.md of a folder."""
    today = datetime.date.today().isoformat()
    at = f"{where()}, scikit-learn {importlib.metadata.version('scikit-learn')}; seed {seed}, reference backend"
    target = folder / f"digits-{today}.md"
    target.write_text("\n\n".join([f"# Digits, {today}", at, markdown(rows)]) + "\n")
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
    scores: dict[str, dict[str, Score]] = {}
    try:
        bench = Bench(options.net or list(NETS), options.seed)
        for variant in ("float", *variants(options.only)):
            scores[variant] = bench.scores(variant)
    except KeyboardInterrupt:
        print("\ninterrupted; nets that were trained are kept, nothing else is", file=sys.stderr)
        raise SystemExit(130) from None
    rows = table(scores)
    print(f"\n{markdown(rows)}")
    if options.write:
        print(f"wrote {write(rows, options.seed, ROOT / 'tests/benchmarks/results').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
