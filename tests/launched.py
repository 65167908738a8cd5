"""Processes of the command that calibrate together: torchrun's, or one after another in processes started once."""

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
from typing import NamedTuple

from tests.test_layers import ROOT

ENVIRONMENT = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}


class Told(NamedTuple):
    """What one process gave back for one line of the command."""

    status: int | str | None
    out: str
    err: str


def run(folder, count, *line):
    """Runs `python -m qpass` by torchrun in `count` processes; a Told of all."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)] if count > 1 else []
    command = [sys.executable, *launch, "-m", "qpass", *line, "--backend", "reference"]
    environment = os.environ | ENVIRONMENT
    found = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    return Told(found.returncode, found.stdout, found.stderr)


def together(folder, count, lines):
    """Runs lines of the command in `count` processes that know of each other; of each line a Told of each process."""
    ranks = [{"RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(count)} for i in range(count)]
    asked = json.dumps(
        [(port, [*line, "--backend", "reference"]) for port, line in zip(free_ports(len(lines)), lines, strict=True)]
    )
    each = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.launched", asked],
            cwd=folder,
            env=os.environ | ENVIRONMENT | {"MASTER_ADDR": "127.0.0.1"} | rank,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (ranks if count > 1 else [{}])
    ]
    told = [json.loads(process.communicate(timeout=300)[0]) for process in each]
    return [[Told(*one) for one in all_of_line] for all_of_line in zip(*told, strict=True)]


def free_ports(count):
    """Ports that nobody listens at."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


def main():
    """What one of the processes does: each line at a port of its own; prints what each gave back."""
    from qpass.cli import main as command

    told = []
    for port, line in json.loads(sys.argv[1]):
        os.environ["MASTER_PORT"] = str(port)
        out, err, status = io.StringIO(), io.StringIO(), None
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                status = command(line) or 0
            except SystemExit as end:
                status = end.code
        told.append((status, out.getvalue(), err.getvalue()))
    print(json.dumps(told))


if __name__ == "__main__":
    main()
