"""python -m qpass demo | inspect | bench"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from qpass.errors import QpassError


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m qpass", description="Quantize PyTorch models.")
    commands = parser.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="quantize MiniLM, and print what came of it")
    demo.add_argument("--scheme", default="w8a8")
    look = commands.add_parser("inspect", help="print a graph, the difference of two, or one site, of MiniLM or a toy")
    look.add_argument("--model", choices=("mlp", "minilm"), default="mlp")
    look.add_argument("--scheme", default="w8a8")
    look.add_argument("--backend", default="auto")
    look.add_argument("--after", metavar="PASS", help="the graph after a pass, or at a level")
    look.add_argument("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="what changed between two passes or levels")
    look.add_argument("--explain", metavar="SITE", help="one site in full")
    look.add_argument("--passes", action="store_true", help="the passes in order")
    look.add_argument("--plan", action="store_true", help="the plan as a table")
    options = parser.parse_args(arguments)
    try:
        return COMMANDS[options.command](options)
    except QpassError as error:
        print(f"qpass: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qpass: interrupted", file=sys.stderr)
        return 130


def run_demo(options: argparse.Namespace) -> int:
    """The demo on real weights and real text."""
    from qpass.demo import demo

    demo(options.scheme)
    return 0


def run_inspect(options: argparse.Namespace) -> int:
    """Compiles a small model (or MiniLM) and shows what was asked for."""
    import qpass
    from qpass.demo import example

    model, batch, calibration = example(options.model)
    compiled = qpass.compile(
        model, options.scheme, example_inputs=batch, calibration=calibration, backend=options.backend
    )
    report = qpass.inspect(compiled)
    if options.passes:
        print("\n".join(report.passes()))
    elif options.plan:
        print(report.plan)
    elif options.diff:
        print(report.diff(*options.diff))
    elif options.explain:
        print(report.explain(options.explain))
    elif options.after:
        print(report.graph(options.after))
    else:
        print(report)
    return 0


COMMANDS = {"demo": run_demo, "inspect": run_inspect}
