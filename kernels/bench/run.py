"""Measures our kernels beside their peers on the GPU at hand, in one run: python kernels/bench/run.py [--tune 20]

    --check          no times: every configuration against float64, and --repeat N runs bit for bit
    --end-to-end     a model of 8 billion parameters instead of single products
    --images         ResNet-50 and MobileNetV2 instead of single products
    --dry            the whole flow on a CPU with tiny shapes and a clock that only pretends

Exits with 1 where a result is wrong, 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

ROOT = Path(__file__).resolve().parents[2]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    if "--dry" in (sys.argv if argv is None else argv):
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported, which nothing has done yet
    args = arguments(argv)
    if not args.dry and not torch.cuda.is_available():
        print("The benchmark measures on a CUDA device, and there is none; --dry runs on a CPU.", file=sys.stderr)
        return 2
    from bench import checks, end_to_end, flow, networks, tables
    from qpass_kernels.measured import KINDS

    device = torch.device("cpu") if args.dry else torch.device("cuda", torch.cuda.current_device())
    torch.manual_seed(0)
    if not args.dry:
        torch.backends.cudnn.benchmark = True  # torch's convolutions at their best
    if args.check:
        shapes, most = (checks.TINY, args.most or 4) if args.dry else (checks.SHAPES, args.most)
        kinds = [kind for kind in args.kinds if kind in KINDS]
        bad = checks.check(kinds, device, flow.dtype_of(args.dry), shapes, args.repeat, most)
        if "conv" in args.kinds:
            bad += checks.check_layers(device, args.dry, args.repeat, most)
        if "rows" in args.kinds:
            bad += checks.check_rows(device, flow.dtype_of(args.dry), args.dry, args.repeat)
        return int(bad > 0)
    folder = args.out or default_folder(device, args.dry)
    if args.end_to_end:
        return end_to_end.main(folder, device, args.dry)
    if args.images:
        return networks.main(folder, device, args.dry)
    rows, about = flow.measured(args, device)
    for path in tables.write(folder, "kernels", rows, about, args.dry):
        print(path)
    return int(any(row.verdict == "wrong" and row.by.startswith("qpass") for row in rows) or "stopped" in about)


def default_folder(device: torch.device, dry: bool) -> Path:
    """Folder docs/benchmarks/<date>-<gpu>, or a temporary folder for a dry run."""
    if dry:
        return Path(tempfile.mkdtemp(prefix="qpass-dry-"))
    from qpass_kernels.measured import slug

    name = slug(torch.cuda.get_device_properties(device).name)
    return ROOT / "docs" / "benchmarks" / f"{datetime.date.today()}-{name}"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from qpass_kernels.measured import KINDS

    kinds = [*KINDS, "conv", "rows"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="folder of the results; docs/benchmarks/<date>-<gpu> unless given")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=kinds, help=f"of {','.join(kinds)}")
    parser.add_argument("--only", type=lambda text: text.split(","), help="shapes of weights: 14336x4096,...")
    parser.add_argument("--seconds", type=float, default=0.3, help="of replays for each case")
    parser.add_argument("--tune", type=float, metavar="SECONDS", help="tune each kernel first, where it was not yet")
    parser.add_argument("--no-peers", action="store_true", help="only torch's plain path beside our kernels")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--repeat", type=int, default=3, help="with --check")
    parser.add_argument("--most", type=int, metavar="N", help="with --check: the first N configurations of each case")
    parser.add_argument("--end-to-end", action="store_true")
    parser.add_argument("--images", action="store_true")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args(argv)
    if unknown := set(args.kinds) - set(kinds):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}; there are {', '.join(kinds)}")
    if args.dry and args.out and (ROOT / "docs") in (args.out.resolve(), *args.out.resolve().parents):
        parser.error("a dry run is no measurement and is not written under docs/")
    return args


if __name__ == "__main__":
    sys.exit(main())
