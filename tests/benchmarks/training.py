"""Quantization-aware training of a byte-level GPT and of small CNNs: what each scheme costs over a float control.

python tests/benchmarks/training.py [--task NAME ...] [--only GLOB ...] [--seed N ...] [--method NAME] [--start NAME]
    [--no-distill] [--write]

Every variant starts from the float weights and gets a quarter of the steps that these were trained for: batches and seeds are
the same, and `float` itself gets them too, as the control that increases are over. A scheme may have another rate; float is
trained at every rate that a scheme has, and the best of these is the control. A variant learns from the labels
and from the control's answers (--no-distill: labels alone). What is scored is the compiled model, on the reference backend,
or another package's own fake-quantized model (--method).
Each finished run is kept in the user's cache by what made it, an unfinished one as it was every 25 steps, so that an
interrupted benchmark goes on from there. --write keeps each run's score and curve in results/training.json, beside those of
other seeds and schemes, and makes the tables of docs/training.md and, with matplotlib, a plot of all that is there.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
from pathlib import Path

import torch
from torch import nn

import qpass

sys.path.insert(0, str(Path(__file__).parent))
from training_peers import PEERS
from training_records import Record, keep, record, report, table
from training_runs import control, trained
from training_tasks import NAMES, Task, tasks


def compiled(model: nn.Module) -> nn.Module:
    """What is scored: the integers, on the exact backend."""
    torch._dynamo.reset()
    return qpass.compile(model, backend="reference")


def how_of(options: argparse.Namespace) -> tuple[str, bool]:
    """(the method, with the start of weights where one is asked for; whether there is a teacher): a record's."""
    start = "" if options.start == "auto" else f" from {options.start}"
    return options.method + start, not options.no_distill


def measure(task: Task, options: argparse.Namespace) -> list[Record]:
    """The records of each seed: the control's and each scheme's."""
    found = []
    how = how_of(options)
    wanted = [s for s in task.schemes if not options.only or any(fnmatch.fnmatchcase(s, g) for g in options.only)]
    for seed in options.seed:
        float_run, base = control(task, seed)
        before = task.score(task.start(seed).eval())
        found.append(record(task, seed, "float", ("", False), (base, base), float_run.curve))
        print(f"{task.name}, seed {seed}: float {before:.4f}, control {base:.4f} {task.unit}", flush=True)
        for scheme in wanted:
            teacher = None if options.no_distill else float_run.model
            run = trained(task, scheme, seed, options.method, teacher, options.start)
            if run is None:
                print(f"{task.name}, {scheme}: {options.method} has no such scheme", flush=True)
                continue
            score = task.score(run.model if options.method in PEERS else compiled(run.model))
            found.append(record(task, seed, scheme, how, (score, base), run.curve))
            print(f"{task.name}, seed {seed}, {scheme}: {score - base:+.4f} over the control", flush=True)
            if options.write:
                keep(found)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", action="append", choices=NAMES, help="may be repeated; all unless given")
    parser.add_argument("--only", action="append", metavar="GLOB", help="schemes; may be repeated")
    parser.add_argument("--seed", action="append", type=int, help="may be repeated; 0, 1 and 2 unless given")
    parser.add_argument("--method", default="lsq+", help=f"of qpass, or a package: {', '.join(PEERS)}")
    parser.add_argument("--start", default="auto", help="of qpass' weights, as qpass.prepare_qat takes it")
    parser.add_argument("--no-distill", action="store_true", help="learn from labels alone")
    parser.add_argument("--sequences", type=int, default=512, help="of bytes that are scored")
    parser.add_argument("--write", action="store_true", help="keep scores and curves, and make the tables of docs")
    options = parser.parse_args()
    options.seed = options.seed or [0, 1, 2]
    if options.write and options.sequences != 512:
        parser.error("--write keeps what is scored on 512 sequences")
    for task in tasks(options.task or NAMES, options.sequences):
        found = measure(task, options)
        print("\n" + table(task, found, how_of(options)) + "\n", flush=True)
    if options.write:
        report(tasks(NAMES, options.sequences))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("interrupted; the same command goes on from where each run was kept")
