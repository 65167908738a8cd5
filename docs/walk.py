"""Write the dumps in docs/*.md anew from the source: python docs/walk.py [PAGE ...]

A block that follows a line `<!-- dump NAME -->` is the result of a function of that name in DUMPS. tests/test_docs.py
makes them again and compares; `normal` takes out what differs between machines.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

import qpass
from qpass import affine
from qpass.backends import cpu, native
from qpass.backends.native import build
from qpass.inspect.report import Report
from qpass.passes import ORDER
from qpass.runtime import runtime_of

sys.path.insert(0, str(Path(__file__).parent))
import train_two_layers as two

DOCS = Path(__file__).parent
SITE, WEIGHT = "up:linear.0", "up.weight"
BLOCK = re.compile(r"(<!-- dump ([a-z-]+) -->\n```text\n)(.*?)(```\n)", re.DOTALL)
VNNI = "vpdpbusd"


class FeedForward(nn.Module):
    """A transformer's feed-forward block: the model of the walk."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(64)
        self.up = nn.Linear(64, 256)
        self.down = nn.Linear(256, 64)

    def forward(self, x):
        return x + self.down(functional.gelu(self.up(self.norm(x))))


class Attention(nn.Module):
    """Three sibling projections, written with flattened rows as older models do."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        rows = x.view(-1, 64)
        q, k, v = (p(rows).view(x.shape[0], -1, 4, 16).transpose(1, 2) for p in (self.q, self.k, self.v))
        return (
            torch.softmax(q @ k.transpose(-1, -2), -1) @ v
        )  # not torch's attention: its type depends on the processor


class Flat(nn.Module):
    """A linear between two views."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 256)

    def forward(self, x):
        return self.up(x.view(-1, 64)).view(x.shape[0], x.shape[1], 256)


class Stem(nn.Module):
    """A convolution with its batch norm, a max pool, and a convolution that reads it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 1)

    def forward(self, x):
        return self.b(functional.max_pool2d(torch.relu(self.norm(self.a(x))), 2))


class Shuffled(Stem):
    """The same two convolutions with a channel shuffle between."""

    def forward(self, x):
        return self.b(functional.channel_shuffle(torch.relu(self.norm(self.a(x))), 4))


def network() -> tuple[nn.Module, list[torch.Tensor]]:
    """The network of convolutions.md and its calibration batches: the page's first block makes them."""
    block = re.search(r"```python\n(.*?)```", (DOCS / "convolutions.md").read_text(), re.DOTALL)
    assert block is not None
    page = sys.modules["convolutions"] = types.ModuleType(
        "convolutions"
    )  # where torch looks up what its functions name
    exec(block[1], vars(page))
    return page.model, page.batches


SHAPES = dict.fromkeys((Stem, Shuffled), (8, 3, 18, 18))
Kind = Callable[[], Any]  # of a model, or `network`


@functools.cache
def compiled(kind: Kind = FeedForward) -> tuple[nn.Module, nn.Module, Report]:
    """(float model, compiled model, report)."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    if kind is network:
        model, data = network()
    else:
        model = kind().eval()
        data = [torch.randn(SHAPES.get(kind, (8, 16, 64))) for _ in range(16)]
    plan = qpass.analyze(model, "w8a8", example_inputs=data[0], calibration=data)  # timings are no part of a plan
    q = qpass.compile(model, plan=plan, example_inputs=data[0], backend="cpu")
    return model, q, qpass.inspect(q, model, data[0])


def report(kind: Kind = FeedForward) -> Report:
    return compiled(kind)[2]


def plan(kind: Kind = FeedForward):
    return runtime_of(compiled(kind)[1]).plan


def order() -> str:
    width = max(len(each.name) for each in ORDER)
    return "\n".join(f"{each.name:<{width}}  {each.needs} -> {each.leaves}" for each in ORDER)


def captured(kind: Kind = FeedForward) -> str:
    return report(kind).graph("capture")


def decided(kind: Kind = FeedForward) -> str:
    return str(plan(kind)).partition("\nw8a8:")[0]


def solved() -> str:
    """The first weights of one output channel: as they were, the codes, and what the codes stand for."""
    model, _, _ = compiled()
    packed = plan()[SITE].packed
    codes, scale, factor = packed.data[0, :6], packed.scale[0], packed.in_mul[:6]
    rows = (
        ("weight", [f"{v:9.5f}" for v in model.up.weight[0, :6].tolist()]),
        ("code", [f"{v:9d}" for v in codes.tolist()]),
        ("(q - 0) * scale * in_mul", [f"{v:9.5f}" for v in (codes * scale * factor).tolist()]),
    )
    lines = [f"{name:<26}{''.join(values)}" for name, values in rows]
    return "\n".join([*lines, f"scale[0] = {float(scale):.6f}"])


def installed() -> str:
    state = compiled()[1].state_dict()
    width = max(map(len, state))
    return "\n".join(
        f"{k:<{width}}  {str(v.dtype).removeprefix('torch.'):<8} {list(v.shape)}" for k, v in state.items()
    )


def lines_with(text: str, *words: str) -> str:
    return "\n".join(line.strip() for line in text.splitlines() if any(word in line for word in words))


def annotated() -> str:
    return lines_with(report().graph("annotate"), f" {SITE}")


def fused() -> str:
    return lines_with(report().graph("fuse"), "qpass.linear")


def lowered() -> str:
    return report().graph("lowered")


def explained() -> str:
    return report().explain(SITE)


def change(before: str, after: str, kind: Kind = FeedForward):
    def made() -> str:
        return report(kind).diff(before, after).rstrip()

    return made


def block_lines(level: str, *words: str) -> str:
    """The lines of the network's first block, and those that hold a word."""
    return lines_with(report(network).graph(level), "  one.", *words)


def block_captured() -> str:
    """The lines of the first block in the captured graph."""
    lines = captured(network).splitlines()
    first, end = (next(i for i, line in enumerate(lines) if word in line) for word in ("@one.", "@two."))
    return "\n".join(line.strip() for line in lines[first:end])


SCHEMES = ("w8a8", "w8a8-dynamic", "w8a16", "w6a6", "w4a8", "w4a4")


def compared() -> str:
    """Schemes on the network: the types of a convolution, and the error of the result."""
    model, data = network()
    lines = [f"{'scheme':<14}{'weight':<8}{'input':<11}error"]
    for scheme in SCHEMES:
        torch._dynamo.reset()
        q = qpass.compile(model, scheme, example_inputs=data[0], calibration=data, backend="reference")
        d = runtime_of(q).plan["one.a.0:conv2d.0"]
        with torch.no_grad():
            found, wanted = q(data[0]), model(data[0])
        error = float((found - wanted).norm() / wanted.norm())
        lines.append(f"{scheme:<14}{d.weight_type!s:<8}{d.input_type or 'float'!s:<11}{error:.4f}")
    return "\n".join(lines)


def simplified() -> str:
    return report(Flat).diff("capture", "simplify").rstrip()


def instruction() -> str:
    """The inner loop of the native kernel for six rows and 64 columns, read back with objdump where there is one."""
    if like_written():
        return like_written()
    command = ["objdump", "-d", "-C", "-Mintel", "--no-show-raw-insn", build.library()._name]
    try:
        listing = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    except FileNotFoundError:
        return "(no objdump here)"
    kernel = next(part for part in listing.split("\n\n") if "tile<qpass::Bytes, 6, 4>" in part.partition("\n")[0])
    code = [" ".join(line.split()[1:]) for line in kernel.splitlines()[1:]]
    first = next(i for i, line in enumerate(code) if line.startswith(VNNI))
    start = max(i for i in range(first) if code[i].startswith("vmovdqu"))
    return "\n".join(code[start - 3 : first + 6])


def like_written() -> str | None:
    """None on a machine like that of the written dumps, which runs the native linear; else what it is without."""
    if native.unavailable():
        return native.unavailable()
    return "products run on oneDNN's AMX kernels here" if cpu.has_amx() else None


def formula() -> str:
    """The reference of the packed linear against torch's float linear on the dequantized numbers."""
    d = plan()[SITE]
    x = torch.randn(5, 64)
    q = affine.quantize(x, d.input_scale, d.input_zero, d.input_type)
    args = (d.input_scale, d.input_zero, "u8/t", d.packed.data, d.packed.scale, "i8/c0", None, None, "", None, None, "")
    y = torch.ops.qpass.linear(q, *args, torch.float32)
    real = affine.dequantize(q, d.input_scale, d.input_zero, d.input_type, torch.float32)
    wanted = functional.linear(real, d.packed.data * d.packed.scale[:, None])
    return f"same as linear on the dequantized numbers: {torch.allclose(y, wanted, rtol=1e-5, atol=1e-5)}"


DUMPS = {
    "order": order,
    "captured": captured,
    "decided": decided,
    "solved": solved,
    "installed": installed,
    "annotated": annotated,
    "migrated": change("annotate", "migrate"),
    "inserted": change("migrate", "insert-qdq"),
    "fused": fused,
    "fuse-change": change("insert-qdq", "fuse"),
    "simplified": simplified,
    "annotate-change": change("simplify", "annotate"),
    "merged": change("fuse", "merge-siblings", Attention),
    "lower-change": change("merge-siblings", "lower"),
    "lowered": lowered,
    "explained": explained,
    "formula": formula,
    "instruction": instruction,
    "folded": change("insert-qdq", "fold-norm", Stem),
    "hoisted": change("fold-norm", "hoist", Stem),
    "conv-fused": change("hoist", "fuse", Stem),
    "laid-out": change("lower", "layout", Shuffled),
    "conv-plan": lambda: decided(network),
    "conv-captured": block_captured,
    "conv-lines": lambda: block_lines("fuse", "max_pool"),
    "conv-lowered": lambda: block_lines("lowered"),
    "conv-schemes": compared,
    "two-ranges": lambda: two.ranges(two.run(two.SEED)),
    "two-choice": lambda: two.choice(two.run(two.SEED)),
    "two-start": lambda: two.numbers(two.run(two.SEED).start[two.SCHEMES[0]]),
    "two-subgradient": lambda: two.subgradient(two.run(two.SEED)),
    "two-curve": lambda: two.curve(two.run(two.SEED)),
    "two-end": lambda: two.numbers(two.run(two.SEED).trained[two.SCHEMES[0]]),
    "two-validated": lambda: two.validated(two.run(two.SEED)),
    "level-float": lambda: report().graph("float"),
    "level-annotated": lambda: report().graph("annotated"),
    "level-qdq": lambda: report().graph("qdq"),
    "level-fused": lambda: report().graph("fused"),
}
OF_THE_MACHINE = ("lowered", "lower-change", "explained", "instruction", "laid-out", "conv-lowered")  # see like_written


def normal(text: str) -> str:
    """A dump without what differs between machines: values of scales, codes and zero points, names of sizes."""
    text = re.sub(r"\bs\d+\b", "s", text)
    text = re.sub(r"-?\d+\.\d+(e-?\d+)?|-?\d+e-?\d+", "#", text)
    text = re.sub(r"(#, )\d+\b", r"\1#", text)  # a zero point stands behind its scale
    text = re.sub(r"(zero point|code|SQNR) +[-\d ]+", r"\1 #", text)
    return re.sub(r"[ \t]+", " ", text).strip()


def blocks(page: Path) -> dict[str, str]:
    """Name -> text of each dump on a page."""
    return {name: body.rstrip() for _, name, body, _ in BLOCK.findall(page.read_text())}


def refresh(page: Path, left: tuple[str, ...]) -> None:
    """Makes the dumps of a page anew, but for those named."""

    def made(m: re.Match[str]) -> str:
        return m[0] if m[2] in left else f"{m[1]}{DUMPS[m[2]]().rstrip()}\n{m[4]}"

    page.write_text(BLOCK.sub(made, page.read_text()))


def main() -> None:
    why = cpu.unavailable() or like_written()
    if why:
        print(f"left as they are, since they are of the native kernels ({why}): {', '.join(OF_THE_MACHINE)}")
    for page in [Path(name) for name in sys.argv[1:]] or sorted(DOCS.glob("*.md")):
        refresh(page, OF_THE_MACHINE if why else ())


if __name__ == "__main__":
    main()
