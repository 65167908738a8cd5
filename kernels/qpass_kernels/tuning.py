"""The tuner: measures the candidates for a shape on the GPU at hand and keeps the fastest that is right.

    python -m qpass_kernels.tuning --shapes 4096x4096,14336x4096 --tokens 1,16,64,2048 --kinds w8a8,w4a16
    python -m qpass_kernels.tuning --network resnet50 --batch 32

A candidate that does not compile, runs out of memory or registers, or gives another result than the rule's choice is left
out, with a line that says so. What was measured lies in a file for each GPU (measured.py), which every call looks at.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from qpass_kernels import layers, samples, timing
from qpass_kernels.candidates import candidates, for_convolution
from qpass_kernels.configs import Config
from qpass_kernels.launch import chip_of
from qpass_kernels.layers import Layer
from qpass_kernels.measured import KINDS, known
from qpass_kernels.trial import Timer, Trial, described, searched

__all__ = ["candidates", "described", "known", "main", "tune", "tune_layer"]


def tune(
    kind: str,
    m: int,
    n: int,
    k: int,
    device: torch.device | str = "cuda",
    seconds: float = 20.0,
    report: Callable[[str], None] | None = None,
    timer: Timer | None = None,
    run: Callable[[object, Config], Tensor] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Config:
    """Measures the candidates of a product [M, K] x [N, K] for about `seconds`, keeps the winner and returns it.

    The rule's choice is measured first; where the time runs out, those most unlike it are not. timer(calls, seconds) and
    run(sample, config) stand in for CUDA graphs and the kernels in tests. An interrupt keeps the best so far.
    """
    device, say = torch.device(device), report or (lambda line: None)
    chip = chip_of(device)
    sample = samples.make(kind, m, n, k, device, dtype)
    size = sum(w.nbytes for w in sample.weights if w is not None)

    def off(y: Tensor) -> float:
        rows = samples.some_rows(y.shape[0], 8, y.device)
        return samples.errors(y[rows], samples.exact(sample, rows)[0])[0]

    copies = sample.copies(timing.copies_of(size, device))
    trial = Trial(copies, run or samples.run, timer or timing.timed, say, off)
    return searched(trial, candidates(kind, m, n, k, chip), seconds, (kind, m, n, k), chip)


def tune_layer(
    layer: Layer,
    batch: int,
    device: torch.device | str = "cuda",
    seconds: float = 20.0,
    report: Callable[[str], None] | None = None,
    timer: Timer | None = None,
    run: Callable[[object, Config], Tensor] | None = None,
) -> Config:
    """As `tune`, for the kernel of int8 convolutions on a layer that is not depthwise.

    A layer that else is a matmul of pixels, which `tune` of w8a8 is for, adds a residual of codes here.
    """
    device, say = torch.device(device), report or (lambda line: None)
    chip, sample = chip_of(device), layers.images(layer, batch, device, layer.is_matmul)
    some = sorted({0, batch - 1})
    size = sum(w.nbytes for w in (sample.x, *sample.weights) if w is not None)
    trial = Trial(
        sample.copies(timing.copies_of(size, device)),
        run or layers.Images.run,
        timer or timing.timed,
        say,
        lambda y: sample.steps_off(y, some),
        layers.apart,
        alike=1.5,
        unit="steps of a code",
    )
    tried = for_convolution(*layers.product(layer, batch), layer.groups, chip)
    return searched(trial, tried, seconds, layers.key(layer, batch), chip)


def main(argv: Sequence[str] | None = None, make: Callable[..., Config] = tune) -> int:
    """The command: a line for each shape, number of tokens and kind. Returns 2 without a GPU, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="python -m qpass_kernels.tuning", description="Tunes kernels on this GPU.")
    parser.add_argument("--shapes", type=_shapes, default=[], help="outputs x inputs of the weights: 4096x4096,...")
    parser.add_argument("--network", choices=[*layers.NETWORKS], help="its convolutions instead of products")
    parser.add_argument("--batch", type=int, default=32, help="images of a convolution")
    parser.add_argument("--tokens", type=_numbers, default=[1, 16, 64, 256, 2048], help="rows of x: 1,16,...")
    parser.add_argument("--kinds", type=_kinds, default=list(KINDS), help=f"of {','.join(KINDS)}")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each line")
    parser.add_argument("--again", action="store_true", help="measure what is known too")
    parser.add_argument("--verbose", action="store_true", help="say which candidates were left out, and why")
    args = parser.parse_args(argv)
    if not args.shapes and args.network is None:
        parser.error("name --shapes of products or a --network")
    if not torch.cuda.is_available() and make is tune:
        print("The tuner measures on a CUDA device, and there is none.", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip, failed = chip_of(device), 0
    say = print if args.verbose else None
    for head, key, run in _lines(args, make, device, say):
        held = None if args.again else known(*key, chip)
        if held is not None:
            print(f"{head}  known: {described(held)}", flush=True)
            continue
        try:
            print(f"{head}  {described(run())}", flush=True)
        except KeyboardInterrupt:
            print(f"{head}  interrupted: what was measured is kept", flush=True)
            return 130
        except timing.Lost:
            raise
        except Exception as error:
            failed = 1
            print(f"{head}  failed: {timing.reason(error)}", flush=True)
    return failed


def _lines(
    args: argparse.Namespace, make: Callable[..., Config], device: torch.device, say: Callable | None
) -> Iterator:
    """(what is tuned, its key, what tunes it). Depthwise layers have one kernel and one rule."""
    for n, k in args.shapes:
        for m, kind in itertools.product(args.tokens, args.kinds):
            key = kind, m, n, k
            yield f"{kind:6} {m:5} x {n} x {k}", key, functools.partial(make, *key, device, args.seconds, say)
    for layer in layers.NETWORKS.get(args.network, ()):
        head = f"{args.batch} x {layer}"
        if layer.is_matmul:
            m, n, _, k = layers.product(layer, args.batch)
            key = "w8a8", m, n, k
            yield f"{head}, as a matmul", key, functools.partial(make, *key, device, args.seconds, say)
        if not layer.is_depthwise:
            run = functools.partial(tune_layer, layer, args.batch, device, args.seconds, say)
            yield head + ", with a residual" * layer.is_matmul, layers.key(layer, args.batch), run


def _shapes(text: str) -> list[tuple[int, int]]:
    found = []
    for part in text.split(","):
        n, _, k = part.partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise argparse.ArgumentTypeError(f"a shape is outputs x inputs, as 4096x4096, not {part!r}")
        found.append((int(n), int(k)))
    return found


def _numbers(text: str) -> list[int]:
    if not all(part.isdecimal() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"numbers of tokens are as 1,16,64, not {text!r}")
    return [int(part) for part in text.split(",")]


def _kinds(text: str) -> list[str]:
    unknown = [part for part in text.split(",") if part not in KINDS]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is not one of {', '.join(KINDS)}")
    return text.split(",")


if __name__ == "__main__":
    sys.exit(main())
