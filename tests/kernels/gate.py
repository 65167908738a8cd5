"""Compile every configuration that the rules give, for chips that are not here, and count what came out.

    python -m tests.kernels.gate          a table: kernel, chip, tiles, tensor core instruction, spills, shared memory,
                                          instructions of the main loop for each weight
    ... --json                            the same as JSON, the main loop of kernels with a budget alone
    ... --json --sample                   of the first configuration of each kernel on each chip, and those with a budget
    ... --write                           keeps the JSON in gate.json, with a digest of what it was made of

Runs without TRITON_INTERPRET: an interpreted kernel cannot be compiled. `ptxas` and `cuobjdump` are part of triton.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tests.kernels.gate_cases import CASES, CHIPS, Case, budget

HERE = Path(__file__).parent
RECORD = HERE / "gate.json"
MATMUL = ("HGMMA", "QGMMA", "IGMMA", "HMMA", "IMMA", "QMMA", "UTCHMMA", "UTCIMMA", "UTCQMMA")


@dataclasses.dataclass(frozen=True)
class Found:
    """What a compiled kernel is: instructions of tensor cores by name, those of its main loop, spills, shared bytes."""

    name: str
    chip: str
    instructions: tuple[str, ...]
    loop: int
    threads: int
    weights: int
    spills: int
    shared: int
    registers: int

    @property
    def a_weight(self) -> float:
        """Instructions of a lane in the main loop, for each weight."""
        return self.loop * self.threads / self.weights if self.weights else 0.0


def compiled(case: Case, loops: bool = True) -> Found:
    """Compiles one case. Its main loop is looked for where it has a budget, or where `loops` are asked for.

    Spills are counted in the disassembly, which takes a quarter of the time: a kernel without local memory has none.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    chip = CHIPS[case.chip]
    kernel = case.kernel()
    constants = {name: value for name, value in case.constants.items() if name in kernel.arg_names}
    names = kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names if name not in constants}
    signature = {name: signature.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n][0] == "*" or n in "NK"}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    major, minor = chip.capability
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    made = triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)
    ptx = made.asm["ptx"]
    found = re.findall(r"wgmma\.mma_async[\w.]*|mma\.sync[\w.]*|tcgen05\.mma[\w.:]*", ptx)
    registers, local = _usage(made.asm["cubin"])
    loops = loops or budget(case.name, case.chip) is not None
    sass = _disassembled(made.asm["cubin"]) if local or loops else []
    loop = _main_loop(sass)
    spills = sum(1 for _, text in sass if text.startswith(("LDL", "STL")))
    return Found(
        case.name, case.chip, tuple(sorted(set(found))), len(loop), 32 * made.metadata.num_warps, case.weights, spills,
        made.metadata.shared, registers,
    )  # fmt: skip


def _usage(cubin: bytes) -> tuple[int, int]:
    """Registers of a kernel, and bytes of its stack and local memory."""
    text = _dumped(cubin, "--dump-resource-usage")
    registers, stack, local = (re.search(rf"\b{word}:(\d+)", text) for word in ("REG", "STACK", "LOCAL"))
    return int(registers[1]), int(stack[1]) + int(local[1])


def _disassembled(cubin: bytes) -> list[tuple[int, str]]:
    text = _dumped(cubin, "--dump-sass")
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*[^;]*);", text)
    return [(int(at, 16), instruction) for at, instruction in lines]


def _dumped(cubin: bytes, flag: str) -> str:
    import triton

    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tools / "cuobjdump", flag, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout


def _main_loop(sass: list[tuple[int, str]]) -> list[str]:
    """The instructions between a backward branch and its target: of such loops the one with most tensor core work."""
    best: list[str] = []
    for at, text in sass:
        target = re.match(r"BRA\S*\s+.*?(0x[0-9a-f]+)", text)
        if not target or int(target[1], 16) >= at:
            continue
        body = [other for where, other in sass if int(target[1], 16) <= where <= at]
        if (_products(body), -len(body)) > (_products(best), -len(best)):
            best = body
    return best


def _products(body: list[str]) -> int:
    return sum(1 for text in body if text.startswith(MATMUL))


def results(cases=CASES, loops: bool = True) -> list[Found]:
    """Every case, compiled in two processes."""
    with ProcessPoolExecutor(2) as pool:
        return list(pool.map(functools.partial(compiled, loops=loops), cases, chunksize=4))


def made_of() -> str:
    """A digest of what the results come from: the kernels and their rules, the cases, this file, triton's version."""
    import triton

    files = sorted((HERE.parents[1] / "kernels/qpass_kernels").rglob("*.py"))
    texts = [path.read_text() for path in (*files, HERE / "gate.py", HERE / "gate_cases.py")]
    return hashlib.sha256("\0".join([triton.__version__, *texts]).encode()).hexdigest()


def sample() -> list[Case]:
    """The first case of each kernel on each chip, and those whose main loop has a budget."""
    first: dict[tuple[str, ...], Case] = {}
    return [c for c in CASES if first.setdefault((c.chip, *c.kernel.path), c) is c or budget(c.name, c.chip)]


def main() -> None:
    """Prints a line for each case; as JSON with --json."""
    listed = "--json" in sys.argv or "--write" in sys.argv
    found = results(sample() if "--sample" in sys.argv else CASES, loops=not listed)
    if "--write" in sys.argv:
        lines = ",\n".join(json.dumps(dataclasses.asdict(f)) for f in found)
        RECORD.write_text(f'{{"made of": "{made_of()}", "found": [\n{lines}\n]}}\n')
        return
    if listed:
        print(json.dumps([dataclasses.asdict(f) for f in found]))
        return
    for f in found:
        cores = ", ".join(f.instructions) or "-"
        print(
            f"{f.name:44s} {f.chip:7s} loop {f.loop:4d}  a weight {f.a_weight:5.2f}  spills {f.spills:3d}  "
            f"registers {f.registers:3d}  shared {f.shared:6d}  {cores}"
        )


if __name__ == "__main__":
    main()
