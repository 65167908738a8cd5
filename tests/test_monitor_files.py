"""What a monitor tells others: files that merge, Prometheus's text, an app to mount."""

import re
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import pytest
import torch
from torch import nn

import qpass
from qpass.serving.exposition import CONTENT_TYPE
from tests.models import batches
from tests.test_monitor import compiled

SHAPE = (32, 16)
SAMPLE = re.compile(r'^([a-z_]+)\{((?:[a-z]+="(?:[^"\\\n]|\\[\\"n])*",?)+)\} (\S+)$')


def net():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 8)).eval()


@pytest.fixture
def q():
    return compiled(net(), shape=SHAPE)


def seen(m):
    return {
        site: (s.looks, s.samples, s.values, s.below, s.above, s.grid.lo, s.grid.hi) for site, s in m.seen().items()
    }


def test_workers_merge_to_what_one_would_have_seen(q, tmp_path):
    """Two that saved, and a third that served and merges them, beside one that served everything."""
    parts = [[x * (1 + i) for x in batches(6, SHAPE)] for i in range(3)]
    for i, part in enumerate(parts):
        with qpass.monitor(q, share=None) as m:
            for x in part:
                q(x)
        if i < 2:
            m.save(tmp_path / f"{i}.safetensors")
    m.merge(tmp_path / "0.safetensors")
    m.merge(str(tmp_path / "1.safetensors"))
    with qpass.monitor(q, share=None) as whole:
        for x in (x for part in parts for x in part):
            q(x)
    assert seen(m) == seen(whole)
    for a, b in zip(
        sorted(m.report(), key=lambda r: r.site), sorted(whole.report(), key=lambda r: r.site), strict=True
    ):
        assert torch.equal(a.stats.grid.histogram, b.stats.grid.histogram)
        assert a.psi == pytest.approx(b.psi)
        assert a.verdict.noise == pytest.approx(b.verdict.noise)
        assert a.status == b.status


def test_monitors_merge_without_files(q):
    with qpass.monitor(q, share=None) as one:
        q(torch.randn(SHAPE))
    with qpass.monitor(q, share=None) as two:
        q(torch.randn(SHAPE))
    one.merge(two)
    assert one.seen()["0:linear.0"].samples == 64


def test_a_file_merges_into_a_twin_of_another_process(q, tmp_path):
    with qpass.monitor(q, share=None) as m:
        for x in batches(10, SHAPE):
            q(x * 3)
    m.save(tmp_path / "seen")
    qpass.save(q, tmp_path / "q")
    twin = qpass.load(tmp_path / "q", net(), backend="reference")
    twin(torch.randn(SHAPE))
    own = qpass.monitor(twin)
    own.merge(tmp_path / "seen")
    assert own.report().drifting
    r = qpass.recalibrate(twin, own)
    assert float(r.after["0:linear.0"].input_scale) > 2 * float(r.before["0:linear.0"].input_scale)


def test_the_text_for_prometheus(q):
    m = qpass.monitor(q, share=None)
    for x in batches(9, SHAPE):
        q(x * 3)
    text = m.metrics()
    assert text.endswith("\n")
    types, found = {}, {}
    for line in text.splitlines():
        if line.startswith("# "):
            _, what, name, told = line.split(" ", 3)
            assert what in ("HELP", "TYPE")
            if what == "TYPE":
                assert name not in types
                types[name] = told
            continue
        match = SAMPLE.match(line)
        assert match, line
        assert match[1] in types, "its type comes first"
        labels = dict(re.findall(r'([a-z]+)="((?:[^"\\]|\\.)*)"', match[2]))
        found[match[1], labels.get("site", "")] = float(match[3])
    assert {name for name, kind in types.items() if kind == "counter"} == {n for n in types if n.endswith("_total")}
    assert found["qpass_monitor_calls_total", ""] == found["qpass_monitor_looks_total", ""] == 9
    for row in m.report():
        assert found["qpass_input_clipped_ratio", row.site] == row.clipped
        assert found["qpass_input_psi", row.site] == row.psi
        assert found["qpass_input_drifting", row.site] == (row.status == "drift")
    assert found["qpass_input_drifting", "0:linear.0"] == 1


def test_names_are_escaped(q):
    m = qpass.monitor(q, share=None)
    m.model = 'a "b"\\\nc'
    line = m.metrics().splitlines()[2]
    assert line.startswith(r'qpass_monitor_calls_total{model="a \"b\"\\\nc"} ')
    assert SAMPLE.match(line)


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST"])
def test_the_app(q, method):
    m = qpass.monitor(q)
    environ, told = {"REQUEST_METHOD": method}, []
    setup_testing_defaults(environ)
    body = b"".join(
        result := validator(m.wsgi)(environ, lambda status, headers, *_: told.append((status, dict(headers))))
    )
    result.close()
    status, headers = told[0]
    if method == "POST":
        assert status.startswith("405")
        assert headers["Allow"] == "GET, HEAD"
        assert body == b""
        return
    assert status == "200 OK"
    assert headers["Content-Type"] == CONTENT_TYPE
    assert int(headers["Content-Length"]) > 0
    assert body == (m.metrics().encode() if method == "GET" else b"")
