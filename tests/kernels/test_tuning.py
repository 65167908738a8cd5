"""The tuner without a GPU: which configuration is found where, files that are broken or shared, candidates that fail."""

import json
import logging
import multiprocessing
import os
from dataclasses import replace

import pytest
import torch
import triton
from triton.runtime.errors import OutOfResources

from qpass_kernels import measured, samples, tuning
from qpass_kernels.candidates import candidates, shared
from qpass_kernels.configs import BUCKETS, Config, bucket, rule
from qpass_kernels.launch import INTERPRETER, Chip
from qpass_kernels.matmul import config_for
from qpass_kernels.measured import known, read, remember, user_file
from qpass_kernels.timing import Times

CHIP = Chip("Test GPU (80 GB)", (9, 0), 132, 232448)
ONE = Config("streamed", 16, 64, 128, 2, warps=4, stages=5)
TWO = replace(ONE, stages=3)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("QPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measured, "SHIPPED", tmp_path / "tuned")
    measured.forget()
    yield tmp_path
    measured.forget()


def fresh(chip=CHIP, **fields):
    """What a new process finds, after the fields of the file were changed."""
    path = user_file(chip)
    if fields:
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    measured.forget()
    return known("w4a16", 1, 64, 256, chip)


def keep(config=ONE, key=("w4a16", 16, 64, 256)):
    remember({key: (config, 3.25)}, CHIP)


@pytest.mark.parametrize("config", [ONE, Config("persistent", 128, 256, 128, band=16, warps=8), Config("library")])
def test_json(config):
    assert Config.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_look_up_order(home, monkeypatch):
    """The user's file, the one that ships, the rule; a given configuration before all."""
    x = torch.zeros(1, 256)
    ruled = rule("w4a16", 1, 64, 256, INTERPRETER)
    assert config_for("w4a16", 1, 64, 256, x, None) == ruled
    (home / "tuned").mkdir()
    path = home / "tuned" / "interpreter.json"
    measured.write(path, {("w4a16", 16, 64, 256): (TWO, 1.0)}, INTERPRETER)
    path.write_text(path.read_text().replace(triton.__version__, "3.0.0"))  # what ships may be of another Triton
    measured.forget()
    assert config_for("w4a16", 1, 64, 256, x, None) == TWO
    remember({("w4a16", 16, 64, 256): (ONE, 1.0)}, INTERPRETER)
    assert config_for("w4a16", 1, 64, 256, x, None) == ONE
    measured.forget()
    assert config_for("w4a16", 16, 64, 256, x, None) == ONE
    assert config_for("w4a16", 17, 64, 256, x, None) == rule("w4a16", 17, 64, 256, INTERPRETER)
    assert config_for("w4a16", 1, 64, 256, x, TWO) == TWO


def test_files_are_read_once(monkeypatch):
    keep()
    measured.forget()
    known("w4a16", 1, 64, 256, CHIP)
    monkeypatch.setattr(measured, "read", None)
    assert known("w4a16", 9, 64, 256, CHIP) == ONE
    assert known("w4a8", 9, 64, 256, CHIP) is None


def test_where_files_lie(monkeypatch):
    assert user_file(CHIP).name == "test-gpu-80-gb.json"
    monkeypatch.delenv("QPASS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert str(user_file(CHIP)) == "/somewhere/qpass/kernels/test-gpu-80-gb.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert str(user_file(CHIP)) == os.path.expanduser("~/.cache/qpass/kernels/test-gpu-80-gb.json")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "Expecting value"),
        ("{" * 9, "Expecting property"),
        ("[" * 100_000, "nested too deep|recursion"),
        ("[]", "not a file of measured kernels"),
        ('{"entries": 3}', "not a file of measured kernels"),
        (b"\xff\xfe\x00", "decode"),
    ],
    ids=["empty", "torn", "deep", "list", "number", "bytes"],
)
def test_broken_file(text, why, caplog):
    """Ignored with one warning, then written anew."""
    keep()
    path = user_file(CHIP)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with caplog.at_level(logging.WARNING, "qpass"):
        assert fresh() is None
        assert known("w4a16", 1, 1, 1, CHIP) is None
        keep(TWO)
    assert len(caplog.records) == 1
    assert "measured kernels are ignored" in caplog.text
    with pytest.raises(ValueError, match=why):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        read(path, CHIP)
    keep(TWO)
    assert fresh() == TWO


@pytest.mark.parametrize("fields", [{"version": 0}, {"version": 99}, {"chip": "Other"}, {"triton": "2.0"}], ids=str)
def test_foreign_file(fields, caplog):
    keep()
    with caplog.at_level(logging.WARNING, "qpass"):
        assert fresh(**fields) is None
    assert f"its {next(iter(fields))} is {next(iter(fields.values()))!r}" in caplog.text
    keep(TWO, ("w8a8", 16, 8, 8))
    assert fresh() is None
    assert read(user_file(CHIP), CHIP) == {("w8a8", 16, 8, 8): (TWO, 3.25)}


@pytest.mark.parametrize(
    "entry",
    [{}, 3, {"us": "fast"}, {"us": 1, "bm": 17}, {"us": 1, "bm": 0}, {"us": 1, "how": "magic"}, {"us": 1, "speed": 2}],
    ids=str,
)
def test_bad_entries(entry, caplog):
    keep()
    assert fresh(entries={"w4a16 16 64x256": entry}) is None
    for name in ("w4a16", "w4a16 16", "w9a9 16 64x256", "w4a16 x 64x256", "w4a16 16 64"):
        assert fresh(entries={name: {"us": 1.0, **ONE.to_json()}}) is None
    assert fresh(entries={"w4a16 16 64x256": {"us": 1.0, **ONE.to_json()}}) == ONE


def _writer(first, barrier):
    barrier.wait()
    for i in range(first, first + 20):
        remember({("w8a8", 16, i, 64): (ONE, 1.0)}, CHIP)


def test_two_processes_write():
    """Nothing is torn, and nothing lost: each reads the file again, alone with it, before it writes."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=_writer, args=(first, barrier)) for first in (1, 101)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0]
    found = read(user_file(CHIP), CHIP)
    assert {n for _, _, n, _ in found} == {*range(1, 21), *range(101, 121)}
    assert {path.suffix for path in user_file(CHIP).parent.iterdir()} == {".json", ".lock"}


@pytest.mark.parametrize("error", [PermissionError(13, "no"), OSError(28, "No space left on device")], ids=str)
@pytest.mark.parametrize("call", ["tempfile.mkstemp", "os.replace"])
def test_disk_that_cannot_be_written(call, error, monkeypatch, caplog):
    """One warning; the process keeps what it measured, the folder no half of a file."""

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(f"qpass_kernels.measured.{call}", fails)
    with caplog.at_level(logging.WARNING, "qpass"):
        keep()
        keep(TWO, ("w4a16", 32, 64, 256))
    assert known("w4a16", 1, 64, 256, CHIP) == ONE
    assert known("w4a16", 32, 64, 256, CHIP) == TWO
    assert [record.getMessage().count("this process only") for record in caplog.records] == [1]
    assert not [path for path in user_file(CHIP).parent.iterdir() if path.suffix == ".part"]


def test_cache_folder_is_a_file(home, caplog):
    (home / "cache").write_text("")
    keep()
    assert known("w4a16", 1, 64, 256, CHIP) == ONE
    assert "this process only" in caplog.text


@pytest.mark.parametrize("kind", measured.KINDS)
def test_candidates(kind):
    """The rule's choice first, each once, all of known sizes and within the chip."""
    for m in (1, 16, 17, 64, 100, *BUCKETS, 8192):
        for n, k in ((4096, 4096), (28672, 8192), (33, 200), (64, 64)):
            found = candidates(kind, m, n, k, CHIP)
            assert found[0] == rule(kind, m, n, k, CHIP)
            assert len(set(found)) == len(found) < 250
            for config in found:
                assert Config.from_json(config.to_json()) == config
                if config.how in ("streamed", "persistent") and config != found[0]:
                    assert shared(kind, config) <= CHIP.shared
                    assert config.split == 1 or config.split * config.bk <= k
                    assert config.bk == 128 or kind in ("w8a8", "fp8")
                    assert config.how == "streamed" or (kind in ("w8a8", "fp8") and k % 16 == 0)
            kinds = {config.how for config in found}
            assert ("dequantized" in kinds) == (kind in ("w8a16", "w4a16") and bucket(m) > 32)


class Bench:
    """Times made up from configurations; those in `fails` raise, those in `wrong` give another result."""

    def __init__(self, times=lambda config: 10.0, fails=None, wrong=()):
        self.times, self.fails, self.wrong = times, fails or {}, wrong
        self.tried, self.lines, self.last = [], [], None

    def run(self, sample, config):
        self.last = config
        if config not in self.tried:
            self.tried.append(config)
        if config in self.fails:
            raise self.fails[config]
        rows = torch.arange(sample.x.shape[0])
        y = samples.exact(sample, rows)[0].to(torch.float16)
        return y + 1 if config in self.wrong else y

    def timer(self, calls, seconds):
        calls[0]()
        us = self.times(self.last)
        return Times(us, us, us)

    def tune(self, kind="w4a16", m=2, n=64, k=256, **options):
        return tuning.tune(
            kind,
            m,
            n,
            k,
            "cpu",
            report=self.lines.append,
            timer=self.timer,
            run=self.run,
            dtype=torch.float16,
            **options,
        )

    @property
    def said(self):
        return "\n".join(self.lines)


def tried(kind="w4a16", m=2):
    return candidates(kind, m, 64, 256, INTERPRETER)


def test_the_fastest_wins_and_is_kept():
    best = tried()[3]
    bench = Bench(lambda config: 5.0 if config == best else 10.0)
    assert bench.tune() == best
    assert bench.tried == tried()
    assert fresh(INTERPRETER) == best
    assert known("w4a16", 16, 64, 256, INTERPRETER) == best
    assert read(user_file(INTERPRETER), INTERPRETER)["w4a16", 16, 64, 256][1] == 5.0


def test_a_lucky_first_look_does_not_win():
    lucky, steady = tried()[1], tried()[2]
    looks = []

    def times(config):
        looks.append(config)
        return {lucky: 1.0 if looks.count(lucky) == 1 else 9.0, steady: 5.0}.get(config, 8.0)

    assert Bench(times).tune() == steady


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore"),
        OutOfResources(300000, 232448, "shared memory"),
        RuntimeError("PassManager::run failed"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_candidates_that_fail_are_left_out(error):
    """Even if it is the rule's choice; the next is right by itself, in float64."""
    first, second = tried()[:2]
    bench = Bench(lambda config: 1.0 if config in (first, second) else 7.0, fails={first: error, second: error})
    assert bench.tune() not in (first, second)
    assert bench.said.count("left out") == 2
    assert type(error).__name__ in bench.said


def test_a_timer_that_fails_leaves_a_candidate_out():
    first = tried()[0]

    def times(config):
        if config == first:
            raise RuntimeError("operation not permitted when stream is capturing")
        return 4.0

    bench = Bench(times)
    assert bench.tune() == tried()[1]
    assert "stream is capturing" in bench.said


@pytest.mark.parametrize("place", [0, 2])
def test_wrong_candidates_do_not_win(place):
    wrong = tried()[place]
    bench = Bench(lambda config: 1.0 if config == wrong else 7.0, wrong=(wrong,))
    assert bench.tune() != wrong
    assert "wrong result" in bench.said


def test_a_result_that_is_not_finite_is_wrong():
    y, true = torch.tensor([[1.0, float("nan")]]), torch.tensor([[1.0, 2.0]])
    assert samples.errors(y, true)[0] == float("inf")
    assert samples.errors(torch.tensor([[1.0, float("inf")]]), true)[1] == float("inf")
    assert samples.errors(true, true) == (0.0, 0.0)


def test_nothing_runs():
    bench = Bench(fails={config: RuntimeError("no kernel image") for config in tried()})
    with pytest.raises(RuntimeError, match=r"none of \d+ configurations of w4a16 2 x 64 x 256 ran on interpreter"):
        bench.tune()
    assert fresh(INTERPRETER) is None


def test_interrupt_keeps_what_was_measured():
    third = tried()[2]

    def times(config):
        if config == third:
            raise KeyboardInterrupt
        return {tried()[1]: 3.0}.get(config, 6.0)

    with pytest.raises(KeyboardInterrupt):
        Bench(times).tune()
    assert fresh(INTERPRETER) == tried()[1]


def test_time_runs_out():
    bench = Bench()
    assert bench.tune(seconds=0.0) == tried()[0]
    assert bench.tried == tried()[:1]
    assert f"{len(tried()) - 1} of {len(tried())} candidates not tried" in bench.said


@pytest.mark.parametrize("kind", measured.KINDS)
def test_samples_mean_what_kernels_compute(kind):
    """With the real kernels, interpreted; odd sizes too, where nothing is in groups."""
    for m, n, k in ((3, 64, 256), (17, 33, 72)):
        sample = samples.make(kind, m, n, k, "cpu", torch.float16)
        assert sample.size == (m, n, k)
        rows = samples.some_rows(m, 5, sample.x.device)
        true, plain = samples.exact(sample, rows)
        largest, mean = samples.errors(samples.run(sample, Config(bm=16, bn=32))[rows], true)
        assert largest < 2.5 * samples.errors(plain, true)[0]
        assert mean < 1e-3
        other = sample.copies(3)[2]
        assert other.weights[0].data_ptr() != sample.weights[0].data_ptr()
        assert torch.equal(samples.run(other), samples.run(sample))


def test_tunes_the_real_kernels():
    found = tuning.tune(
        "w8a8",
        2,
        32,
        128,
        "cpu",
        timer=lambda calls, s: [c() for c in calls] and Times(1.0, 1.0, 1.0),
        dtype=torch.float16,
    )
    assert found == known("w8a8", 2, 32, 128, INTERPRETER)


def test_command(capsys):
    calls = []

    def make(kind, m, n, k, device, seconds, report):
        calls.append((kind, m, n, k))
        if kind == "fp8":
            raise RuntimeError("no fp8 here")
        remember({(kind, bucket(m), n, k): (ONE, 1.0)}, INTERPRETER)
        return ONE

    line = ["--shapes", "64x256,32x128", "--tokens", "1,64", "--kinds", "w4a16,fp8"]
    assert tuning.main(line, make) == 1
    assert len(calls) == 8
    out = capsys.readouterr().out
    assert "streamed 16x64x128 warps 4 stages 5 split 2" in out
    assert "failed: RuntimeError: no fp8 here" in out
    assert tuning.main([*line[:-1], "w4a16"], make) == 0
    assert capsys.readouterr().out.count("known: streamed") == 4
    assert len(calls) == 8
    tuning.main([*line[:-1], "w4a16", "--again"], make)
    assert len(calls) == 12


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (["--shapes", "4096"], "outputs x inputs"),
        (["--shapes", "8x0"], "outputs x inputs"),
        (["--shapes", "8x8", "--tokens", "1,-2"], "numbers of tokens"),
        (["--shapes", "8x8", "--kinds", "w3a3"], "'w3a3' is not one of w8a8"),
    ],
)
def test_bad_command(line, why, capsys):
    with pytest.raises(SystemExit):
        tuning.main(line)
    assert why in capsys.readouterr().err


def test_command_interrupted(capsys):
    def make(*args):
        raise KeyboardInterrupt

    assert tuning.main(["--shapes", "64x256"], make) == 130
    assert "what was measured is kept" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_command_without_a_gpu(capsys):
    assert tuning.main(["--shapes", "64x256"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
