"""Directories of saved models that are damaged, of another model, on a full disk, or written by two at once."""

import json
import os
import shutil

import pytest
import torch

import qpass
from qpass import shards
from qpass.errors import QpassError
from qpass.shards import INDEX
from tests.models import FeedForward, encoder
from tests.test_bad_files import finished, start
from tests.test_shards import LIMIT, compiled, names
from tests.test_shards import saved as saved
from tests.untouched import untouched


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def missing(folder):
    next(folder.glob("model-00002-of-*")).unlink()


def truncated(folder):
    shard = next(folder.glob("model-00002-of-*"))
    shard.write_bytes(shard.read_bytes()[:-100])


def of_another_save(folder):
    other = encoder(2)
    with torch.no_grad():
        other[0].q.weight.mul_(2)
    qpass.save(qpass.compile(other, "w8a16", backend="reference"), folder.parent / "other", shard_size=LIMIT)
    shard = next((folder.parent / "other").glob("model-00001-of-*"))
    shutil.copy(shard, folder / shard.name)


def index_cut(folder):
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-10])


def index_foreign(folder):
    (folder / INDEX).write_text('{"metadata": {"total_size": 1}, "weight_map": {}}')


def index_leading_out(folder):
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(index | {"weight_map": {"a": "../model.safetensors"}}))


def nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# what happens to the directory, what the error says
DAMAGES = (
    (missing, r"the shard .*/out/model-00002-of-\d+.safetensors is missing, and .*index.json lists it; copy all files"),
    (truncated, r"/out/model-00002-of-\d+.safetensors cannot be read, it is truncated or damaged"),
    (of_another_save, "out is damaged: the checksum of '.*' does not match; save it again"),
    (index_cut, "model.safetensors.index.json cannot be read, it is truncated or damaged"),
    (index_foreign, "not one that qpass wrote"),
    (index_leading_out, "names a shard '../model.safetensors'; expected names such as"),
    (nothing, "out holds neither model.safetensors nor model.safetensors.index.json; it is no saved model, or not all"),
)


@pytest.mark.parametrize(("damage", "message"), DAMAGES, ids=[d[0].__name__ for d in DAMAGES])
def test_a_damaged_directory_is_refused(saved, damage, message):
    folder, _ = saved
    damage(folder)
    m = encoder(2)
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.load(folder, m)


# the model to load into, what the error says
OTHERS = (
    (lambda: FeedForward().eval(), "holds a Sequential with .*, which this FeedForward lacks; build the model"),
    (lambda: encoder(2, width=64), r"in the file and .* in this Sequential; build the model"),
    (lambda: encoder(3), "this Sequential has '4.q.weight', which the saved Sequential lacks"),
)


@pytest.mark.parametrize(("make", "message"), OTHERS, ids=["class", "width", "depth"])
def test_a_directory_of_another_architecture(saved, make, message):
    m = make()
    with untouched(m), pytest.raises(QpassError, match=message):
        qpass.load(saved[0], m)


@pytest.mark.parametrize("size", [0, -1, "5GB"])
def test_a_wrong_shard_size(saved, size):
    with pytest.raises(QpassError, match=r"shard_size is .*; expected a number of bytes"):
        qpass.save(saved[1], saved[0], shard_size=size)


FULL_DISK = """
import resource, sys, torch
from qpass import QpassError, shards
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
tensors = {"a": torch.zeros(10_000), "b": torch.zeros(10_000), "c": torch.zeros(30_000)}
try:
    shards.write_directory(sys.argv[1], "model", {}, tensors, {"config.json": "new"}, 40_000)
except QpassError as error:
    print(error)
"""


def test_a_full_disk_leaves_the_old_directory(saved):
    folder, _ = saved
    old = contents(folder)
    out = finished(start(FULL_DISK, folder))
    assert f"cannot write {folder}" in out
    assert "free some space or choose another folder" in out
    assert contents(folder) == old


def test_a_full_disk_leaves_no_new_directory(tmp_path):
    assert "cannot write" in finished(start(FULL_DISK, tmp_path / "new"))
    assert not names(tmp_path)


def test_an_interrupted_save_leaves_the_old_directory(saved, monkeypatch):
    folder, q = saved
    old, whole = contents(folder), shards.save_file

    def interrupted(tensors, part, metadata):
        whole(tensors, part, metadata)
        if "00002" in part.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(shards, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        qpass.save(q, folder, shard_size=LIMIT // 2)
    assert contents(folder) == old


SAVING = """
import sys, torch
from qpass import shards
value = float(sys.argv[2])
tensors = {f"t{i}": torch.full((20_000,), value) for i in range(4)}
for i in range(20):
    shards.write_directory(sys.argv[1], "model", {"by": value}, tensors, {"config.json": str(value)}, 80_000 + i % 2 * 80_000)
"""


def test_two_processes_save_to_one_directory(tmp_path):
    folder = tmp_path / "out"
    processes = [start(SAVING, folder, i) for i in (1, 2)]
    while any(p.poll() is None for p in processes):
        if (folder / INDEX).exists():
            header, tensors = shards.read_directory(folder, "model")
            assert all(bool((t == header["by"]).all()) for t in tensors.values())
    for process in processes:
        finished(process)
    header, tensors = shards.read_directory(folder, "model")
    assert (folder / "config.json").read_text() == str(header["by"])
    assert len(tensors) == 4
    assert names(folder) == ["config.json", *[f"model-0000{i}-of-00002.safetensors" for i in (1, 2)], INDEX]


def test_nowhere_to_write(tmp_path):
    with pytest.raises(QpassError, match=r"cannot write .*no such folder/out"):
        qpass.save(compiled(), f"{tmp_path}/no such folder/out{os.sep}")
