"""What a search is worth: python -m tests.benchmarks.searching [--gpt | --minilm] [--write] [--checkpoint DIR]

GPT (byte_gpt.py, seed 0): recipes found for the size of uniform 4 and 3 bits, against the uniform ones with the same solver,
in KL to float on held-out source. `blocks`: tables and head stay float in both, as language.py has them. `all`: the found
recipe may also round tables and head, at the bits that the uniform one takes with them in float. A greedy search stands
beside; behind it what other packages' searches choose, those that are installed (searching_peers.py). MiniLM: seconds of a
search with three candidates, and how well each estimate ranks the measured losses. Calibrated on 128 sequences, or 64 texts;
losses of groups are measured on --batches of them. --write keeps the figures.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import sys
import time
from pathlib import Path

import torch

import qpass
from qpass.search import cost, explored
from qpass.search.candidates import FLOAT
from qpass.search.find import rank_of
from qpass.search.groups import Group
from qpass.search.program import Values, greedy, solve, total

sys.path.insert(0, str(Path(__file__).parent))
from byte_gpt import sequences, source, trained
from language import BATCH, CALIBRATED, logits, score
from minilm import markdown, where
from searching_peers import rows as peers

ROOT = Path(__file__).resolve().parents[2]
CANDIDATES = ("w3a16", "w4a16", "w4a16-g32", "w5a16", "w6a16", "w8a16", None)
UNIFORM, GOALS = ("w4a16", "w3a16"), {"w4a16": 0.6, "w3a16": 0.5}
THREE, RANKED, MINUTES = ("w4a16", "w8a8", None), 0.9, 3.0


def blocks_only(known: explored.Search) -> list[Group]:
    """The groups, with tables and head in float."""
    return [
        g if g.name.startswith("blocks.") else Group(g.name, g.sites, (FLOAT,)) for g in known.groups
    ]  # fmt: skip


def recipes(known: explored.Search, uniform: str, loss: Values) -> dict[str, dict[str, str]]:
    """Name -> choice by group: uniform, and what is found at its size."""
    table = cost.bits_table(known.prepared, known.groups)
    blocks = blocks_only(known)
    chosen = {f"uniform {uniform}": {g.name: FLOAT if g.takes == (FLOAT,) else uniform for g in blocks}}
    limit = total(table.of, chosen[f"uniform {uniform}"])
    for scope, groups in (("blocks", blocks), ("all", known.groups)):
        for how, choose in (("found", solve), ("greedy", greedy)):
            chosen[f"{how}, {scope}"] = choose(groups, loss, table.of, limit)
    return chosen


def gpt(batches: int, scored: int, checkpoint: str | None):
    """(head, tables, misses): KL of each recipe on held-out sequences, and of what peers choose."""
    model, (train, held_out) = trained(0), source()
    calibration = list(sequences(train, CALIBRATED, 1)[:, :-1].split(BATCH))
    tokens = sequences(held_out, scored, 2)
    wanted = logits(model, tokens)
    start = time.perf_counter()
    known = explored.explored(
        model, "kl", CANDIDATES, calibration[0], calibration, calibration[:batches], None, True, explored.MEASURED,
        checkpoint, 0,
    )  # fmt: skip
    rank, seconds = rank_of(known.losses), time.perf_counter() - start
    head = f"byte GPT: Spearman of second order with measured {rank:.3f}; {seconds:.0f} s up to the losses"
    print(head, flush=True)
    bits, size = cost.bits_table(known.prepared, known.groups), cost.bytes_table(known.prepared, known.groups)
    rows = [
        ("recipe", "KL, bits", "of uniform", "predicted KL, nats", "bits a weight", "bytes stored", "same top byte")
    ]
    misses = [] if rank >= RANKED else [f"GPT: Spearman {rank:.3f} < {RANKED}"]

    @functools.cache
    def judged(choice: tuple[tuple[str, str], ...]) -> tuple[float, float]:
        torch._dynamo.reset()
        _, plan = known.plan(dict(choice))
        return score(logits(qpass.compile(model, plan=plan, backend="reference"), tokens), wanted, tokens)[2:]

    judge = lambda chosen: judged(tuple(sorted(chosen.items())))
    for uniform in UNIFORM:
        base = 0.0
        for name, chosen in recipes(known, uniform, known.loss).items():
            kl, same = judge(chosen)
            base = base or kl
            predicted = total(known.loss, chosen)
            figures = (
                f"{kl:.5f}",
                f"{kl / base:.2f}",
                f"{predicted:.5f}",
                f"{bits.total(chosen):.3f}",
                f"{size.total(chosen):,.0f}",
            )
            rows.append((f"{uniform}: {name}", *figures, f"{100 * same:.2f} %"))
            print("  ".join(rows[-1]), flush=True)
            if name == "found, all" and kl / base > GOALS[uniform]:
                misses.append(f"{uniform}: {kl / base:.2f} of uniform > {GOALS[uniform]}")
    theirs, behind = peers(
        model, calibration[:batches], blocks_only(known), known.loss, lambda chosen: judge(chosen)[0]
    )
    return head, [rows, *([theirs] if theirs[1:] else [])], misses + behind


def minilm(batches: int, checkpoint: str | None):
    """(head, misses): seconds and ranks of a search with three candidates, at 5 bits a weight."""
    from qpass.demo import example

    model, first, calibration = example("minilm")
    start, work = time.perf_counter(), time.process_time()
    found = qpass.search(
        model, "5 bits", candidates=THREE, example_inputs=first, calibration=calibration,
        validation=calibration[:batches], checkpoint=checkpoint,
    )  # fmt: skip
    seconds, work = time.perf_counter() - start, time.process_time() - work
    print(found, flush=True)
    head = (
        f"MiniLM, {', '.join(map(str, THREE))}: {seconds:.0f} s ({work:.0f} s of processor time), Spearman {found.rank:.3f}, "
        f"{found.metric} {found.loss:.4g}, predicted "
        + ", ".join(f"{value:.4g} {name}" for name, value in found.predicted.items())
    )
    misses = [] if found.rank >= RANKED else [f"MiniLM: Spearman {found.rank:.3f} < {RANKED}"]
    return head, misses + ([] if seconds <= 60 * MINUTES else [f"MiniLM: {seconds:.0f} s > {60 * MINUTES:.0f}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpt", action="store_true", help="the GPT alone")
    parser.add_argument("--minilm", action="store_true", help="MiniLM alone")
    parser.add_argument("--batches", type=int, default=4, help="that losses of groups are measured on")
    parser.add_argument("--scored", type=int, default=256, help="held-out sequences")
    parser.add_argument("--checkpoint", help="a directory that keeps what is measured")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    parts, misses = [f"# Searches, {datetime.date.today().isoformat()}", where()], []
    if options.minilm or not options.gpt:
        head, missed = minilm(options.batches, options.checkpoint)
        parts, misses = [*parts, head], misses + missed
        print(head, flush=True)
    if options.gpt or not options.minilm:
        head, tables, missed = gpt(options.batches, options.scored, options.checkpoint)
        parts, misses = [*parts, head, *map(markdown, tables)], misses + missed
    parts += ["Goals missed: " + "; ".join(misses) if misses else "All goals are met."]
    print("\n\n".join(parts))
    if options.write:
        name = f"searching-{datetime.date.today().isoformat()}.md"
        (ROOT / "tests/benchmarks/results" / name).write_text("\n\n".join(parts) + "\n")
    return int(bool(misses))


if __name__ == "__main__":
    raise SystemExit(main())
