"""New scales from what was seen: the model that compiling by the new plan gives, to the last bit, and back again."""

import threading

import pytest
import torch
from torch import nn

import qpass
from qpass.runtime import runtime_of
from tests.models import batches, encoder, relative
from tests.processors import needs_bytes
from tests.test_monitor import compiled

BACKENDS = ["reference", pytest.param("cpu", marks=needs_bytes)]


class Residual(nn.Module):
    """An add, a pool, a concatenate: values that several read, with one scale."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(16, 8, 1)
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 5)

    def forward(self, x):
        y = self.a(x).relu()
        y = torch.cat([y, (self.b(y) + y).relu()], 1)
        return self.head(self.c(self.pool(y)).relu().mean((2, 3)))


class Split(nn.Module):
    """A few channels behind an activation reach far: they are split into copies (solvers/split.py)."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(16, 64), nn.Linear(64, 16)
        with torch.no_grad():
            self.up.weight[:3] *= 12
            self.down.weight[:, :3] /= 12

    def forward(self, x):
        return self.down(torch.relu(self.up(x)))


MODELS = {
    "encoder": (lambda: encoder(2), (4, 6, 32), "w8a8"),
    "images": (lambda: Residual().eval(), (4, 3, 10, 10), "w8a8"),
    "split": (lambda: Split().eval(), (32, 16), "w8a8"),
    "fp8": (lambda: encoder(), (4, 6, 32), "fp8-static"),
    "four bits": (lambda: encoder(), (4, 6, 32), "w4a4"),
    "percentile": (lambda: encoder(), (4, 6, 32), "w8a8,range=percentile:99.9"),
}


def shifted(count, shape):
    return [x * 2.5 + 0.7 for x in batches(count, shape)]


def watched(name, backend="reference"):
    make, shape, scheme = MODELS[name]
    model = make()
    q = compiled(model, scheme, backend, shape)
    m = qpass.monitor(q, share=None)
    for x in shifted(20, shape):
        q(x)
    assert m.errors == 0, m.error
    return model, q, m, shifted(1, shape)[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", MODELS)
def test_it_is_the_model_of_the_new_plan(name, backend):
    if backend == "cpu" and name == "four bits":
        backend = "reference"
    model, q, m, x = watched(name, backend)
    before, old = q(x), runtime_of(q).plan
    r = qpass.recalibrate(q, m)
    after = q(x)
    again = qpass.compile(model, plan=r.after, backend=backend)(x)
    assert torch.equal(after, again)
    assert relative(after, model(x)) < 0.8 * relative(before, model(x))
    assert runtime_of(q).plan is r.after
    assert r.before is old
    static = {d.site for d in old if d.static}
    assert set(r.sites) | set(r.kept) == static
    for site in r.sites:
        a, b = r.before[site], r.after[site]
        assert a.packed is b.packed
        assert a.bias is b.bias
        assert a.input_shift is b.input_shift
    r.undo()
    assert torch.equal(q(x), before)
    assert runtime_of(q).plan is old


def test_split_channels_keep_their_copies_and_reach_as_far_as_was_seen():
    _, q, m, _ = watched("split")
    r = qpass.recalibrate(q, m)
    d = r.after["down:linear.0"]
    assert d.input_extra is not None
    assert d.input_extra is r.before["down:linear.0"].input_extra
    reach = float(d.input_scale) * (d.input_type.qmax - int(d.input_zero)) * (1 + d.input_extra)
    for x in shifted(10, (32, 16)):
        q(x)
    row = next(row for row in m.report() if row.site == "down:linear.0")
    assert row.clipped < 0.001
    assert (row.stats.reach <= reach * 1.3).all()


def test_what_must_agree_agrees():
    _, q, m, _ = watched("images")
    r = qpass.recalibrate(q, m)
    groups = {}
    for d in r.after:
        if d.static:
            groups.setdefault((d.group, str(d.input_type)), set()).add((float(d.input_scale), int(d.input_zero)))
    assert any(len([d for d in r.after if d.group == g]) > 1 for g, _ in groups)
    assert all(len(scales) == 1 for scales in groups.values())


def test_one_site_by_name():
    _, q, m, _ = watched("encoder")
    r = qpass.recalibrate(q, m, sites="1.up")
    assert r.sites == ("1.up:linear.0",)
    assert r.before["0.q:linear.0"] is r.after["0.q:linear.0"]
    assert "1.up:linear.0" in str(r)
    assert "->" in str(r)
    r.undo()
    for x in shifted(20, (4, 6, 32)):
        q(x)
    assert set(qpass.recalibrate(q, m, sites="0.k").sites) == {f"0.{name}:linear.0" for name in "qkv"}, (
        "one scale for all"
    )


def test_a_monitor_begins_anew_and_finds_no_drift_any_more():
    _, q, m, _ = watched("encoder")
    assert m.report().drifting
    qpass.recalibrate(q, m)
    assert all(row.stats.samples == 0 for row in m.report())
    for x in shifted(10, (4, 6, 32)):
        q(x)
    assert not m.report().drifting, str(m)
    for x in batches(10):
        q(x / 3)
    assert m.report().drifting, "what was usual before is drift now"


def test_the_report_says_so():
    _, q, m, _ = watched("encoder")
    qpass.recalibrate(q, m)
    assert "recalibrated while serving: 12 of 12 static inputs" in str(qpass.inspect(q))
    for x in shifted(20, (4, 6, 32)):
        q(x)
    qpass.recalibrate(q, m)
    assert str(qpass.inspect(q)).count("recalibrated while serving") == 1


def test_undoing_in_the_wrong_order_or_twice():
    _, q, m, x = watched("encoder")
    before = q(x)
    first = qpass.recalibrate(q, m)
    for y in shifted(20, (4, 6, 32)):
        q(y * 2)
    second = qpass.recalibrate(q, m)
    with pytest.raises(qpass.QpassError, match="another recalibration came after"):
        first.undo()
    second.undo()
    with pytest.raises(qpass.QpassError, match="undone already"):
        second.undo()
    first.undo()
    assert torch.equal(q(x), before)


def test_graphs_captured_since_are_undone_too():
    model, q, m, x = watched("encoder")
    r = qpass.recalibrate(q, m)
    after = q(x[:1])  # batch 1 has a graph of its own
    assert torch.equal(after, qpass.compile(model, plan=r.after, backend="reference")(x[:1]))
    r.undo()
    assert torch.equal(q(x[:1]), qpass.compile(model, plan=r.before, backend="reference")(x[:1]))


def test_it_is_saved_and_loaded(tmp_path):
    _, q, m, x = watched("images")
    r = qpass.recalibrate(q, m)
    qpass.save(q, tmp_path / "q")
    again = qpass.load(tmp_path / "q", Residual().eval(), backend="reference")
    assert torch.equal(again(x), q(x))
    for d in r.after:
        other = runtime_of(again).plan[d.site]
        assert (d.seen is None) == (other.seen is None)
        if d.seen is not None:
            assert torch.equal(d.seen.edges, other.seen.edges)
            assert torch.equal(d.seen.shares, other.seen.shares)
            assert d.seen.clipped == other.seen.clipped


def test_other_threads_get_the_old_model_or_the_new_one():
    _, q, m, x = watched("encoder")
    before, stop, results = q(x), threading.Event(), []

    def serve():
        while not stop.is_set():
            results.append(q(x))

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for t in threads:
        t.start()
    r = qpass.recalibrate(q, m)
    after = q(x)
    stop.set()
    for t in threads:
        t.join()
    assert results
    assert all(torch.equal(y, before) or torch.equal(y, after) for y in results)
    assert not torch.equal(before, after)
    r.undo()


def test_a_callback_may_recalibrate():
    done = []
    q = compiled(encoder())
    m = qpass.monitor(q, share=None, on_drift=lambda row: done or done.append(qpass.recalibrate(q, m, minimum=8)))
    for x in shifted(30, (4, 6, 32)):
        q(x)
    assert len(done) == 1
    assert runtime_of(q).plan is done[0].after
    assert m.errors == 0
