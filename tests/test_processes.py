"""torchrun -m qpass compile: several processes give the plan of one, and what is wrong on one is said by all."""

import datetime

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import qpass
from qpass import processes
from qpass.errors import QpassError
from qpass.solvers import rows
from tests.launched import run, together
from tests.models import FeedForward
from tests.test_resume import same
from tests.test_sequential import stack

NET = "tests.launched_nets:net"
PLANS = (("net", "w4a16-g32"), ("wide", "w3a16-g32"), ("wide", "w4a8-g32"), ("net", "w8a8"), ("images", "w8a8"))


def folder(path, count):
    made = path / str(count)
    made.mkdir()
    return made


def test_two_processes_give_the_plan_of_one(tmp_path):
    """To the last bit: batches are few, so the order of their sums is exact in float64."""
    names = [f"{target}-{scheme}" for target, scheme in PLANS]
    line = "compile tests.launched_nets:{} --scheme {} -o q.qpass --save-plan {}.plan"
    lines = [line.format(*case, name).split() for case, name in zip(PLANS, names, strict=True)]
    alone, ours = (together(folder(tmp_path, count), count, lines) for count in (1, 2))
    for name, (one,), (first, second) in zip(names, alone, ours, strict=True):
        assert first.status == second.status == 0, (name, first.err, second.err)
        assert first.out.count("wrote ") == 2
        assert first.out == one.out
        assert not second.out
        plans = [qpass.Plan.load(tmp_path / str(count) / f"{name}.plan") for count in (1, 2)]
        assert plans[0].quantized
        same(*plans)


def test_two_processes_go_on_from_what_one_has_finished(tmp_path):
    line = ["compile", NET, "--scheme", "w3a16-g32", "--checkpoint", "steps", "-o", "net.qpass", "--save-plan"]
    assert run(tmp_path, 1, *line, "1.plan")[0] == 0
    files = sorted((tmp_path / "steps").iterdir())
    assert len(files) == 6
    for file in files[2:]:
        file.unlink()
    kept = [file.stat().st_mtime_ns for file in files[:2]]
    status, _, err = run(tmp_path, 2, *line, "2.plan")
    assert status == 0, err
    assert sorted((tmp_path / "steps").iterdir()) == files
    assert [file.stat().st_mtime_ns for file in files[:2]] == kept
    same(qpass.Plan.load(tmp_path / "1.plan"), qpass.Plan.load(tmp_path / "2.plan"))


NONE = "process 1 of 2 has no calibration batch, of 1 in all; give each process one at least"
OTHER = "comes to other sites than process 0: first to two:linear.0 where that comes to one"
TEXT = "process 1 of 2: calibration batch 1 is a str; expected a tensor"
WRONG = (
    *(("few", scheme, NONE) for scheme in ("w8a8", "w4a16-g32")),
    ("unseeded", "w8a8", "process 1 of 2 has other weights than process 0: all are to calibrate one model"),
    *(("branches", scheme, OTHER) for scheme in ("w8a8", "w4a16-g32")),
    *(("broken", scheme, TEXT) for scheme in ("w8a8", "w4a16-g32")),
)


def test_what_is_wrong_on_one_is_said_by_all(tmp_path):
    lines = [
        ("compile", f"tests.launched_nets:{target}", "--scheme", scheme, "-o", "q.qpass") for target, scheme, _ in WRONG
    ]
    for case, both in zip(WRONG, together(tmp_path, 2, lines), strict=True):
        for told in both:
            assert told.status not in (0, None), case
            assert not told.out, case
            said = [line for line in told.err.splitlines() if line.startswith("qpass: ")]
            assert said, (case, told.err)
            assert all(case[2] in line for line in said), (case, told.err)
            assert "Traceback" not in told.err, case
    assert not (tmp_path / "q.qpass").exists()


def test_what_is_wrong_ends_torchrun(tmp_path):
    status, out, err = run(tmp_path, 2, "compile", "tests.launched_nets:broken", "--scheme", "w8a8", "-o", "net.qpass")
    assert status != 0
    assert not out
    said = [line for line in err.splitlines() if line.startswith("qpass: ")]  # torchrun ends the second to come
    assert said, err
    assert all(TEXT in line for line in said), err
    assert "qpass/processes.py" not in err  # torchrun's own traceback is the only one
    assert not (tmp_path / "net.qpass").exists()


def test_nobody_waits_for_a_process_that_was_killed(tmp_path):
    status, out, err = run(
        tmp_path, 2, "compile", "tests.launched_nets:killed", "--scheme", "w4a16-g32", "-o", "net.qpass"
    )
    assert status != 0
    assert not out
    assert all(
        "another process of this run has ended" in line for line in err.splitlines() if line.startswith("qpass: ")
    )
    assert not (tmp_path / "net.qpass").exists()


def worker(rank, folder):
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=100)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=limit)
    assert (processes.rank(), processes.count()) == (rank, 2)
    done = []
    assert processes.spread(lambda i: done.append(i) or i * i, range(5)) == [0, 1, 4, 9, 16]
    assert done == [[0, 2, 4], [1, 3]][rank]
    assert processes.first_alone(lambda: f"of {rank}") == "of 0"
    assert list(processes.mine("abcde")) == [["a", "c", "e"], ["b", "d"]][rank]
    for kind in (QpassError, torch.linalg.LinAlgError):  # and both go on together afterwards

        def fails(kind=kind):
            if rank == 1:
                raise kind("no good")
            return rank

        with pytest.raises(kind, match="no good"):
            processes.collected(fails)
    with pytest.raises(QpassError, match="process 1 of 2 has other scheme"):
        processes.agree({"scheme": rank}, "mend it")
    if rank == 0:  # alone: what needs no calibration waits for nobody
        plan = qpass.analyze(stack(), "w8a16", torch.zeros(1, 20, 64))
        assert len(plan.quantized) == 6
    dist.destroy_process_group()


def test_each_way_to_share(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)


def test_alone():
    assert (processes.rank(), processes.count()) == (0, 1)
    assert processes.spread(lambda i: i + 1, [1, 2]) == [2, 3]
    assert list(processes.mine([1, 2])) == [1, 2]
    with processes.joined():
        assert not dist.is_initialized()


def test_rows_are_rounded_in_chunks_that_others_may_take():
    model = FeedForward().eval()
    wide = torch.nn.Sequential(torch.nn.Linear(32, 2 * rows.ROWS + 1), torch.nn.Linear(2 * rows.ROWS + 1, 8)).eval()
    batches, taken = [torch.randn(8, 32) for _ in range(2)], []

    def each(work, chunks):
        taken.append([len(chunk) for chunk in chunks])
        return [work(chunk) for chunk in chunks]

    with rows.by(each):
        plan = qpass.analyze(wide, "w4a16-g32,sequential=no", calibration=batches)
    same(plan, qpass.analyze(wide, "w4a16-g32,sequential=no", calibration=batches))
    assert taken == [[rows.ROWS, rows.ROWS, 1], [8]]
    packed = plan["0:linear.0"].packed
    assert packed.data.shape == (2 * rows.ROWS + 1, 32)
    assert packed.scale.shape[0] == packed.zero.shape[0] == 2 * rows.ROWS + 1
    qpass.analyze(model, "w4a16-g32", calibration=batches)
    assert len(taken) == 2
