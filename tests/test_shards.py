"""Models saved as directories: configurations beside the weights, shards, and each way a directory can be wrong."""

import json
import os
import shutil

import pytest
import torch
import transformers
from safetensors import safe_open

import qpass
from qpass import shards
from qpass.errors import QpassError
from qpass.shards import INDEX, SINGLE
from tests.models import FeedForward, batches, encoder
from tests.models_transformers import NAMED, causal
from tests.test_bad_files import finished, start
from tests.untouched import untouched

LIMIT = 10_000
LLAMA = next(make for name, make, _ in NAMED if name == "llama")


def llama():
    return LLAMA().eval()


def compiled(model=None, x=None):
    x = batches(1)[0] if x is None else x
    return qpass.compile(model or encoder(2), "w8a8-dynamic", x, backend="reference")


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def contents(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


@pytest.fixture
def saved(tmp_path):
    """A directory of several shards, and the model that was saved there."""
    q = qpass.compile(encoder(2), "w8a16", backend="reference")
    qpass.save(q, tmp_path / "out", shard_size=LIMIT)
    return tmp_path / "out", q


@pytest.mark.parametrize("size", [None, LIMIT])
def test_loads_bit_for_bit(tmp_path, size):
    q, x = compiled(), batches(1)[0]
    qpass.save(q, f"{tmp_path / 'out'}/", shard_size=size)
    loaded = qpass.load(tmp_path / "out", encoder(2), backend="reference")
    assert torch.equal(loaded(x), q(x))
    assert loaded.state_dict().keys() == q.state_dict().keys()


def test_shards_keep_to_their_size(saved):
    folder, _ = saved
    files = [name for name in names(folder) if name != INDEX]
    assert len(files) > 2
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    index = json.loads((folder / INDEX).read_text())
    total = 0
    for name in files:
        with safe_open(str(folder / name), "pt") as file:
            held = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        size = sum(t.nbytes for t in held.values())
        assert size <= LIMIT or len(held) == 1
        assert all(index["weight_map"][key] == name for key in held)
        total += size
    assert index["metadata"]["total_size"] == total


def test_a_language_model_keeps_its_configurations(tmp_path):
    model = llama()
    model.generation_config.max_new_tokens = 7
    model.generation_config.pad_token_id = 0
    q = qpass.compile(model, "w8a16", backend="reference")
    qpass.save(q, f"{tmp_path}/")
    assert names(tmp_path) == ["config.json", "generation_config.json", SINGLE]
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert config.to_diff_dict() | {"dtype": None} == model.config.to_diff_dict() | {
        "dtype": None,
        "architectures": ["LlamaForCausalLM"],
        "transformers_version": config.to_diff_dict()["transformers_version"],
    }
    fresh = transformers.AutoModelForCausalLM.from_config(config).eval()
    loaded = qpass.load(tmp_path, fresh, backend="reference")
    assert loaded.generation_config.max_new_tokens == 7
    assert fresh.generation_config.max_new_tokens != 7
    ids = causal(1, 5)["input_ids"]
    tokens = loaded.generate(ids, do_sample=False)
    assert tokens.shape == (1, 12)
    assert torch.equal(tokens, q.generate(ids, do_sample=False))


def test_other_files_stay_and_an_older_model_goes(saved):
    folder, q = saved
    (folder / "tokenizer.json").write_text("{}")
    qpass.save(q, folder)
    assert names(folder) == [SINGLE, "tokenizer.json"]
    qpass.save(q, folder, shard_size=LIMIT)
    assert SINGLE not in names(folder)
    assert {INDEX, "tokenizer.json"} < set(names(folder))
    qpass.load(folder, encoder(2))


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
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": {}}))


def index_leading_out(folder):
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], "../model.safetensors")
    (folder / INDEX).write_text(json.dumps(index))


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
