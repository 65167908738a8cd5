"""Disks that are full or read-only, files of other models, several processes at once, settings that are wrong."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import qpass
from qpass import profit, storage
from qpass.errors import QpassError
from tests.models import FeedForward, encoder
from tests.test_layers import ROOT
from tests.untouched import untouched

X = torch.randn(4, 6, 32, generator=torch.Generator().manual_seed(1))


def model():
    return FeedForward().eval()


def compiled(m=None):
    return qpass.compile(m or model(), "w8a8", X, [X], backend="reference")


def start(code, *arguments, **variables):
    """A Python process in the background."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=environment,
    )


def finished(process):
    """What a process printed; fails where it failed."""
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return out


FULL_DISK = """
import resource, sys, torch
from qpass import QpassError, storage
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    storage.write(sys.argv[1], "plan", {}, {"a": torch.zeros(100_000)})
except QpassError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "plan"
    storage.write(path, "plan", {}, {"a": torch.ones(3)})
    old = path.read_bytes()
    out = finished(start(FULL_DISK, path))
    assert f"cannot write {path}" in out
    assert "free some space or choose another folder" in out
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


def test_an_interrupted_save_leaves_the_old_file(tmp_path, monkeypatch):
    path, q = tmp_path / "model", compiled()
    qpass.save(q, path)
    old = path.read_bytes()

    def interrupted(tensors, part, metadata):
        part.write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(storage, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qpass.save(q, path)
    assert path.read_bytes() == old
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_saved_file_is_readable_as_others_are_and_links_stay(tmp_path):
    plain, link, real = tmp_path / "plain", tmp_path / "link", tmp_path / "real"
    plain.write_text("")
    real.write_text("")
    link.symlink_to(real)
    storage.write(link, "plan", {}, {"a": torch.ones(3)})
    assert link.is_symlink()
    assert real.stat().st_mode == plain.stat().st_mode
    assert storage.read(real, "plan")[1]["a"].tolist() == [1, 1, 1]


SAVING = """
import sys, torch
from qpass import storage
value = float(sys.argv[2])
for _ in range(60):
    storage.write(sys.argv[1], "plan", {"by": value}, {"a": torch.full((50_000,), value), "b": torch.full((7,), value)})
"""


def test_two_processes_save_to_one_path(tmp_path):
    path = tmp_path / "plan"
    processes = [start(SAVING, path, i) for i in (1, 2)]
    while any(p.poll() is None for p in processes):
        if path.exists():
            header, tensors = storage.read(path, "plan")
            assert all(bool((t == header["by"]).all()) for t in tensors.values())
    for process in processes:
        finished(process)
    storage.read(path, "plan")
    assert [p.name for p in tmp_path.iterdir()] == ["plan"]


REMEMBERING = """
import sys
from qpass import profit
for i in range(200):
    profit._remember({f"{sys.argv[1]} {i}": [1.0, 2.0]})
"""


def test_two_processes_write_the_timing_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    processes = [start(REMEMBERING, i, XDG_CACHE_HOME=str(tmp_path)) for i in (1, 2)]
    while any(p.poll() is None for p in processes):
        if profit.cache_file().exists():
            json.loads(profit.cache_file().read_text())
    for process in processes:
        finished(process)
    found = profit.remembered()
    assert {"1 199", "2 199"} & found.keys()
    assert all(value == [1.0, 2.0] for value in found.values())
    assert [p.name for p in profit.cache_file().parent.iterdir()] == ["timings.json"]


def wanted_timing():
    q = qpass.compile(model(), "w8a8-dynamic", X)
    return all(d.note or d.quantized for d in qpass.inspect(q).plan)


def test_a_cache_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """A file in the place of the folder: unlike a mode, it stops root too."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert wanted_timing()


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"a": 1}', "null"])
def test_a_damaged_timing_cache(tmp_path, monkeypatch, content):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    profit.cache_file().parent.mkdir()
    profit.cache_file().write_text(content)
    assert profit.remembered() == {}
    profit._remember({"b": [1.0, 2.0]})
    assert profit.remembered() == {"b": [1.0, 2.0]}


SETTINGS = (
    (
        "QPASS_CHECK",
        "numerik",
        r"QPASS_CHECK='numerik' is not one of structure, numeric, off.*Did you mean 'numeric'\?",
    ),
    ("QPASS_LOG", "rule", r"QPASS_LOG='rule' is not one of rules.*Did you mean 'rules'\?"),
    ("QPASS_DUMP", "{}/file/folder", "QPASS_DUMP: cannot write to .*/file/folder: .*; name another folder"),
)


@pytest.mark.parametrize(("name", "value", "message"), SETTINGS, ids=[s[0] for s in SETTINGS])
def test_a_wrong_setting_is_said_before_calibration(tmp_path, monkeypatch, name, value, message):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(name, value.format(tmp_path))
    m, asked = model(), []
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.compile(m, "w8a8", calibration=(asked.append(1) or X for _ in range(2)), backend="reference")
    assert not asked


def test_a_dump_folder_that_goes_away(tmp_path, monkeypatch):
    monkeypatch.setenv("QPASS_DUMP", str(tmp_path / "dump"))
    q = qpass.compile(model(), "w8a8-dynamic", backend="reference")
    (tmp_path / "dump").rmdir()
    (tmp_path / "dump").write_text("")
    with pytest.raises(QpassError, match="QPASS_DUMP: cannot write"):
        q(X)


# name, the model that was saved, the one to load into, what the error says
OTHERS = (
    ("another class", model, encoder, "FeedForward with 'up.weight', which this Sequential lacks; build the model"),
    (
        "another width",
        model,
        lambda: FeedForward(64).eval(),
        r"\(96, 32\) in the file and \(96, 64\) in this FeedForward",
    ),
    ("one layer more", encoder, lambda: encoder(2), "has '2.q.weight', which the saved Sequential lacks; build"),
    (
        "another dtype",
        model,
        lambda: model().bfloat16(),
        r"torch.float32 in the file.*load into model.to\(torch.float32\)",
    ),
)


@pytest.mark.parametrize(("saved", "make", "message"), [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
@pytest.mark.parametrize("inplace", [True, False])
def test_load_into_another_architecture(tmp_path, saved, make, message, inplace):
    qpass.save(compiled(saved()), tmp_path / "model")
    m = make()
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.load(tmp_path / "model", m, inplace=inplace)


def test_a_changed_header_is_refused(tmp_path):
    qpass.save(compiled(), tmp_path / "model")
    with safe_open(str(tmp_path / "model"), "pt") as file:
        metadata, tensors = file.metadata(), {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118
    header = json.loads(metadata["qpass"])
    header["plan"]["decisions"][0]["input_type"] = "i8/t"
    save_file(tensors, tmp_path / "model", metadata=metadata | {"qpass": json.dumps(header)})
    m = model()
    with untouched(m), pytest.raises(QpassError, match="the checksum of its header does not match"):
        qpass.load(tmp_path / "model", m)
