"""A calibration that is interrupted goes on behind its last finished group, and ends with the plan of one that was not."""

import dataclasses
import logging
import sys

import pytest
import torch

import qpass
from qpass import sequential
from qpass.cli import main
from qpass.packing import Packed
from qpass.seen import Seen
from tests.test_sequential import Stack, data, stack

SCHEME = "w3a16-g32"


def same(first, second):
    """Equal plans, to the last bit of every tensor."""
    assert list(first.decisions) == list(second.decisions)
    assert (first.notes, first.attention, first.parameters) == (second.notes, second.attention, second.parameters)
    for one, other in zip(first, second, strict=True):
        for field in dataclasses.fields(one):
            _same(getattr(one, field.name), getattr(other, field.name))


def _same(one, other):
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, Packed | Seen):
        for field in dataclasses.fields(one):
            _same(getattr(one, field.name), getattr(other, field.name))
    else:
        assert one == other


@pytest.fixture
def solved(monkeypatch):
    """The first sites of the groups that were solved; KeyboardInterrupt in the place of number `solved.stop`."""

    class Solved(list):
        stop = None

    found, real = Solved(), sequential.decide_group

    def decide_group(ask, members, observations):
        if len(found) == found.stop:
            raise KeyboardInterrupt
        found.append(members[0].name)
        return real(ask, members, observations)

    monkeypatch.setattr(sequential, "decide_group", decide_group)
    return found


def interrupt(solved, stop, *args, **options):
    solved.stop = stop
    with pytest.raises(KeyboardInterrupt):
        qpass.analyze(*args, **options)
    solved.stop = None
    solved.clear()


@pytest.mark.parametrize("scheme", [SCHEME, "w4a8-g32-dynamic", "w4a8-g32"])
def test_an_interrupted_run_goes_on_and_ends_with_the_same_plan(tmp_path, solved, scheme):
    batches, steps = data(), tmp_path / "deep" / "steps"
    whole = qpass.analyze(stack(), scheme, calibration=batches)
    assert len(solved) == 6
    solved.clear()
    interrupt(solved, 2, stack(), scheme, calibration=batches, checkpoint=steps)
    assert [file.name for file in sorted(steps.iterdir())] == [f"group-0000{i}.safetensors" for i in range(2)]
    resumed = qpass.analyze(stack(), scheme, calibration=batches, checkpoint=steps)
    assert solved == ["ups.1:linear.0", "downs.1:linear.0", "ups.2:linear.0", "downs.2:linear.0"]
    same(whole, resumed)
    solved.clear()
    same(whole, qpass.analyze(stack(), scheme, calibration=batches[::-1], checkpoint=str(steps)))
    assert not solved


def test_finished_groups_are_not_observed(tmp_path, solved, monkeypatch):
    batches, looked, real = data(2), [], sequential._look
    interrupt(solved, 3, stack(), SCHEME, calibration=batches, checkpoint=tmp_path)
    monkeypatch.setattr(
        sequential, "_look", lambda s, p, members: (looked.append(members[0].name), real(s, p, members))
    )
    q = qpass.compile(stack(), SCHEME, calibration=batches, checkpoint=tmp_path, backend="reference")
    assert set(looked) == {"downs.1:linear.0", "ups.2:linear.0", "downs.2:linear.0"}
    assert len(qpass.inspect(q).plan.quantized) == 6


def test_another_run_is_refused_with_what_differs(tmp_path, solved):
    batches = data(2)
    interrupt(solved, 1, stack(), SCHEME, calibration=batches, checkpoint=tmp_path)
    kept = sorted(tmp_path.iterdir())
    other = stack()
    other.downs[2].bias.data[0] += 1e-3
    refused = {
        f"its scheme is not .*{SCHEME}; this one: w4a16.*another folder": (stack(), "w4a16-g32", batches, None),
        r"its scheme is not .*this one: w3a16-g32 ups\.0=float": (stack(), SCHEME, batches, {"ups.0": None}),
        "its weights are not those of this one": (other, SCHEME, batches, None),
        "its calibration batches are not": (stack(), SCHEME, data(3), None),
        "its scheme and weights and calibration batches are not": (other, "w4a16-g32", data(3), None),
    }
    for words, (model, scheme, seen, recipe) in refused.items():
        with pytest.raises(qpass.QpassError, match=words):
            qpass.analyze(model, scheme, calibration=seen, recipe=recipe, checkpoint=tmp_path)
    assert not solved
    assert sorted(tmp_path.iterdir()) == kept


@pytest.mark.parametrize("damage", ["cut", "changed", "gone"])
def test_a_damaged_file_is_said_and_solved_again(tmp_path, solved, caplog, damage):
    batches = data(2)
    whole = qpass.analyze(stack(), SCHEME, calibration=batches)
    interrupt(solved, 4 + len(solved), stack(), SCHEME, calibration=batches, checkpoint=tmp_path)
    file = tmp_path / "group-00002.safetensors"
    held = bytearray(file.read_bytes())
    if damage == "cut":
        file.write_bytes(held[:-100])
    elif damage == "changed":
        held[-1] ^= 1
        file.write_bytes(held)
    else:
        file.unlink()
    with caplog.at_level(logging.WARNING, "qpass"):
        same(whole, qpass.analyze(stack(), SCHEME, calibration=batches, checkpoint=tmp_path))
    said = [record.message for record in caplog.records if "group-00002" in record.message]
    assert ["damaged" in text and "from group 3 of 6 on" in text for text in said] == [True] * (damage != "gone")
    assert solved == ["ups.1:linear.0", "downs.1:linear.0", "ups.2:linear.0", "downs.2:linear.0"]
    solved.clear()
    same(whole, qpass.analyze(stack(), SCHEME, calibration=batches, checkpoint=tmp_path))
    assert not solved


def test_a_directory_that_cannot_be_written_fails_before_any_work(tmp_path):
    (tmp_path / "file").write_text("in the way")
    ran = []

    class Watched(Stack):
        def forward(self, x):
            ran.append(x)
            return super().forward(x)

    with pytest.raises(qpass.QpassError, match=r"the checkpoint .*file.steps cannot be written to: .*another folder"):
        qpass.analyze(Watched().eval(), SCHEME, data(1)[0], data(1), checkpoint=tmp_path / "file" / "steps")
    assert not ran


def test_a_full_disk_in_the_middle(tmp_path, monkeypatch):
    from qpass import storage

    batches, real, written = data(2), storage.save_file, []

    def save_file(tensors, path, metadata):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        written.append(path)
        real(tensors, path, metadata=metadata)

    monkeypatch.setattr(storage, "save_file", save_file)
    with pytest.raises(qpass.QpassError, match="No space left"):
        qpass.analyze(stack(), SCHEME, calibration=batches, checkpoint=tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.iterdir())) == 2
    resumed = qpass.analyze(stack(), SCHEME, calibration=batches, checkpoint=tmp_path)
    same(resumed, qpass.analyze(stack(), SCHEME, calibration=batches))


def test_what_has_nothing_to_resume_says_so(tmp_path):
    plan = qpass.analyze(stack(), "w8a8", calibration=data(2), checkpoint=tmp_path)
    assert plan.notes == [
        f"{tmp_path} holds nothing of this run, as it is calibrated in one pass: an interrupted one begins again"
    ]
    with pytest.raises(qpass.QpassError, match="there is no calibration"):
        qpass.analyze(stack(), "w8a16", checkpoint=tmp_path)
    with pytest.raises(qpass.QpassError, match="plan already holds"):
        qpass.compile(stack(), plan=plan, checkpoint=tmp_path)


NETS = """
from tests.test_sequential import data, stack

def net():
    return stack(), data(1)[0], data()
"""


def test_the_command_line_says_how_to_go_on(tmp_path, solved, monkeypatch, capsys):
    (tmp_path / "stacks.py").write_text(NETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    line = (
        f"compile stacks:net --scheme {SCHEME} --checkpoint steps --backend reference -o net.qpass --save-plan net.plan"
    )
    solved.stop = 2
    assert main(line.split()) == 130
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert said == "qpass: interrupted; finished groups, 2 of them, are in steps: the same command goes on behind them"
    solved.stop = None
    assert main(line.split()) == 0
    assert len(solved) == 6
    sys.modules.pop("stacks", None)
    same(qpass.Plan.load("net.plan"), qpass.analyze(stack(), SCHEME, data(1)[0], data()))
