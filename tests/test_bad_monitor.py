"""Bad input of monitor and recalibrate: errors name what is wrong and what to do; a callback that raises does no harm."""

import math

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from qpass.serving.monitor import Monitor
from tests.models import batches
from tests.test_monitor import compiled
from tests.test_monitor_files import SHAPE, net


@pytest.fixture
def q():
    return compiled(net(), shape=SHAPE)


@pytest.fixture
def m(q):
    made = qpass.monitor(q, share=None)
    q(torch.randn(SHAPE))
    return made


def test_a_model_without_static_inputs():
    for scheme in ("w8a8-dynamic", "w8a16"):
        dynamic = qpass.compile(net(), scheme, torch.randn(SHAPE), backend="reference")
        with pytest.raises(qpass.QpassError, match=r"Sequential has no static input.*such as w8a8"):
            qpass.monitor(dynamic)


@pytest.mark.parametrize("what", [nn.Linear(2, 2), None, "q", torch.compile(nn.Linear(2, 2))])
def test_a_model_that_qpass_did_not_compile(what, m):
    with pytest.raises(qpass.QpassError, match=r"was not compiled by qpass; pass the result of qpass\.compile"):
        qpass.monitor(what)
    with pytest.raises(qpass.QpassError, match="was not compiled by qpass"):
        qpass.recalibrate(what, m)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"share": 0}, "share=0: expected a number above 0 and at most 1"),
        ({"share": 2.0}, r"share=2\.0: expected"),
        ({"share": math.nan}, "share=nan"),
        ({"share": "half"}, "share='half'"),
        ({"threshold": 0}, "threshold=0: expected a number above 0, a population"),
        ({"threshold": -1}, "threshold=-1"),
        ({"threshold": math.inf}, "threshold=inf"),
        ({"threshold": None}, "threshold=None"),
        ({"clipped": 1.5}, r"clipped=1\.5: expected a number above 0 and at most 1"),
        ({"clipped": True}, "clipped=True"),
        ({"window": 4}, "window=4: expected a whole number of looks, at least 16"),
        ({"window": 20.0}, r"window=20\.0"),
        ({"on_drift": "mail"}, "on_drift is a str; expected a function of one SiteDrift"),
    ],
)
def test_arguments(q, arguments, match):
    with pytest.raises(qpass.QpassError, match=match):
        qpass.monitor(q, **arguments)
    assert runtime_of(q).monitor is None


def test_two_monitors(q, m):
    with pytest.raises(qpass.QpassError, match=r"is monitored already; stop\(\) that monitor first"):
        qpass.monitor(q)
    m.stop()
    qpass.monitor(q)


def test_too_few_samples(q, m):
    plan = runtime_of(q).plan
    with pytest.raises(
        qpass.QpassError, match=r"needs 64 samples of an input, and the monitor has seen 32 at most.*minimum="
    ):
        qpass.recalibrate(q, m)
    assert runtime_of(q).plan is plan
    m.reset()
    with pytest.raises(qpass.QpassError, match="needs 1 samples of an input, and the monitor has seen 0"):
        qpass.recalibrate(q, m, minimum=1)


@pytest.mark.parametrize("minimum", [0, -3, 2.5, True, None])
def test_a_minimum_that_is_none(q, m, minimum):
    with pytest.raises(qpass.QpassError, match=r"expected a whole number of samples, at least 1"):
        qpass.recalibrate(q, m, minimum=minimum)


def test_sites_that_are_not_there(q, m):
    with pytest.raises(
        qpass.QpassError, match=r"no static input of the plan matches sites='0:liner\.0'.*Did you mean '0:linear\.0'"
    ):
        qpass.recalibrate(q, m, sites="0:liner.0")


def test_something_that_is_no_monitor(q):
    with pytest.raises(qpass.QpassError, match=r"got a NoneType; expected what qpass\.monitor returned"):
        qpass.recalibrate(q, None)


def test_a_monitor_of_another_model(m):
    other = compiled(net(), shape=SHAPE, count=3)
    with pytest.raises(qpass.QpassError, match="what this monitor saw is of another plan"):
        qpass.recalibrate(other, m)
    theirs = qpass.monitor(other)
    with pytest.raises(qpass.QpassError, match="what is to be merged was seen by a monitor of another plan"):
        theirs.merge(m)


def test_a_monitor_that_was_stopped_before_a_recalibration(q, m):
    for x in batches(4, SHAPE):
        q(x * 2)
    m.stop()
    qpass.recalibrate(q, m)
    with pytest.raises(qpass.QpassError, match="before a recalibration"):
        qpass.recalibrate(q, m)


def test_weights_that_changed(q, m):
    for x in batches(4, SHAPE):
        q(x)
    with torch.no_grad():
        next(iter(q.parameters())).add_(1)
    with pytest.raises(qpass.QpassError, match=r"replaced or written to after qpass\.compile; compile it again"):
        qpass.recalibrate(q, m)


def test_a_file_of_another_plan(q, m, tmp_path):
    m.save(tmp_path / "seen")
    other = qpass.monitor(compiled(net(), shape=SHAPE, count=3))
    with pytest.raises(qpass.QpassError, match=r"seen was written by a monitor of another plan"):
        other.merge(tmp_path / "seen")
    for x in batches(4, SHAPE):
        q(x * 2)
    qpass.recalibrate(q, m)
    with pytest.raises(qpass.QpassError, match="before or after a recalibration"):
        m.merge(tmp_path / "seen")


@pytest.mark.parametrize("damage", ["cut", "turned", "plan", "empty", "absent"])
def test_a_damaged_file(q, m, tmp_path, damage):
    path = tmp_path / "seen"
    m.save(path)
    whole = path.read_bytes()
    before = m.seen()["0:linear.0"].samples
    if damage == "plan":
        runtime_of(q).plan.save(path)
    elif damage == "absent":
        path.unlink()
    else:
        turned = bytearray(whole)
        turned[-9] ^= 1
        path.write_bytes({"cut": whole[: len(whole) // 2], "turned": bytes(turned), "empty": b""}[damage])
    match = {"plan": "holds a plan, expected a monitor", "absent": "there is no file"}.get(damage, "damaged")
    with pytest.raises(qpass.QpassError, match=match):
        m.merge(path)
    assert m.seen()["0:linear.0"].samples == before


def test_a_folder_that_is_not_there(m, tmp_path):
    with pytest.raises(qpass.QpassError, match="cannot write"):
        m.save(tmp_path / "nowhere" / "seen")


def test_a_callback_that_raises(q):
    def mail(row):
        raise OSError("no route to host")

    m = qpass.monitor(q, share=None, on_drift=mail)
    with pytest.warns(UserWarning, match=r"on_drift raised OSError: no route to host") as told:
        [q(x * 4) for x in batches(24, SHAPE)]
    assert len(told) == 1
    assert m.errors == 0
    assert m.report().drifting


def test_a_plan_of_before_there_were_monitors(tmp_path):
    """Its file holds no histogram: drift is unknown, what is clipped is not, and a recalibration makes one."""
    model = net()
    plan = qpass.analyze(model, "w8a8", torch.randn(SHAPE), batches(8, SHAPE))
    for name, d in plan.decisions.items():
        object.__setattr__(d, "seen", None)
        assert plan[name].seen is None
    plan.save(tmp_path / "plan")
    q = qpass.compile(model, plan=qpass.Plan.load(tmp_path / "plan"), backend="reference")
    q(torch.randn(SHAPE))
    m = qpass.monitor(q, share=None)
    for x in batches(9, SHAPE):
        q(x)
    assert {r.status for r in m.report()} == {"unknown"}
    assert "holds no histogram of calibration for 2 of its inputs" in str(m)
    m.reset()
    for x in batches(20, SHAPE):
        q(x * 5)
    assert m.report().drifting
    qpass.recalibrate(q, m)
    for x in batches(9, SHAPE):
        q(x * 5)
    assert {r.status for r in m.report()} == {"ok"}


def test_a_graph_that_cannot_be_watched(q, monkeypatch):
    def broken(*_):
        raise RuntimeError("no such pass")

    monkeypatch.setattr("qpass.serving.monitor.Watcher", broken)
    with pytest.warns(UserWarning, match="RuntimeError: no such pass"):
        m = qpass.monitor(q)
    assert isinstance(m, Monitor)
    assert m.errors == 1
    q(torch.randn(SHAPE))
