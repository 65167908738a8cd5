"""The tuner without a GPU: what it tries, candidates that fail or are wrong, interrupts, the command."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from qpass_kernels import measured, samples, tuning
from qpass_kernels.candidates import candidates, shared
from qpass_kernels.configs import BUCKETS, Config, bucket, rule
from qpass_kernels.launch import INTERPRETER
from qpass_kernels.measured import known, read, remember, user_file
from qpass_kernels.timing import Times
from tests.kernels.entries import CHIP, ONE, fresh


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
        options |= {"report": self.lines.append, "timer": self.timer, "run": self.run, "dtype": torch.float16}
        return tuning.tune(kind, m, n, k, "cpu", **options)

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
