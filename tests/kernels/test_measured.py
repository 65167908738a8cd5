"""Measured configurations on disk: which is found where, files that are broken, foreign or shared, disks that are full."""

import json
import logging
import multiprocessing
import os

import pytest
import torch
import triton

from qpass_kernels import measured
from qpass_kernels.configs import Config, rule
from qpass_kernels.launch import INTERPRETER
from qpass_kernels.matmul import config_for
from qpass_kernels.measured import known, read, remember, user_file
from tests.kernels.entries import CHIP, ONE, TWO, fresh, keep


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
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=why):
        read(path, CHIP)
    keep(TWO)
    assert fresh() == TWO


@pytest.mark.parametrize("fields", [{"version": 0}, {"version": 99}, {"chip": "Other"}, {"triton": "2.0"}], ids=str)
def test_foreign_file(fields, caplog):
    keep()
    with caplog.at_level(logging.WARNING, "qpass"):
        assert fresh(fields=fields) is None
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
    assert fresh(fields={"entries": {"w4a16 16 64x256": entry}}) is None
    for name in ("w4a16", "w4a16 16", "w9a9 16 64x256", "w4a16 x 64x256", "w4a16 16 64"):
        assert fresh(fields={"entries": {name: {"us": 1.0, **ONE.to_json()}}}) is None
    assert fresh(fields={"entries": {"w4a16 16 64x256": {"us": 1.0, **ONE.to_json()}}}) == ONE


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
