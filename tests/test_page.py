"""The page's file: what is written, escaped, collapsed, refused."""

import json
import os
import re
import time

import pytest

from qpass.errors import QpassError
from qpass.inspect.page import collapse, write
from qpass.inspect.page.collapse import NODES, collapsed, merged
from qpass.inspect.page.embed import json_text
from tests.page_documents import document, unmeasured

DATA = re.compile(r'<script id="([\w-]+)" type="application/json">(.*?)</script>', re.DOTALL)
HOSTILE = "</script><script>alert(1)</script><!--\u2028]]>&lt;\"'"


def read(path):
    """Data element -> its value."""
    return {name: json.loads(text) for name, text in DATA.findall(path.read_text(encoding="utf-8"))}


def nodes(modules, inputs=lambda i: [i - 1] if i else []):
    return [
        {"id": i, "op": "aten.mul", "text": f"%{i}", "module": module, "site": None, "rule": None, "dtype": None,
         "shape": None, "inputs": inputs(i), "kind": "call"}
        for i, module in enumerate(modules)
    ]  # fmt: skip


def with_nodes(found):
    made = document(0)
    made["graphs"][0]["levels"] = [{"level": "float", "after": "capture", "nodes": found}]
    return made


def test_the_document_comes_back(tmp_path):
    made = document(2)
    write(made, tmp_path / "page.html")
    data = read(tmp_path / "page.html")
    report = data.pop("report")
    assert report["summary"] == made["summary"]
    assert report["sites"] == made["sites"]
    for i, level in enumerate(made["graphs"][0]["levels"]):
        assert data[f"nodes-0-{i}"] == level["nodes"]
        assert report["graphs"][0]["levels"][i]["nodes"] == len(level["nodes"])


def test_it_asks_for_nothing_from_outside(tmp_path):
    write(document(1), tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "default-src 'none'" in text
    markup = re.sub(r"<script\b.*?</script>", "", text, flags=re.DOTALL)
    assert not re.findall(r"(?:src|href)=[\"']?(?![\"'#]|data:)[^\s>]+|url\(|@import", markup)


def test_texts_of_a_model_cannot_end_their_element(tmp_path):
    made = document(1)
    made["summary"]["model"] = made["sites"][0]["site"] = made["sites"][0]["source"]["code"] = HOSTILE
    made["graphs"][0]["levels"][0]["nodes"][0]["text"] = HOSTILE
    write(made, tmp_path / "page.html")
    assert read(tmp_path / "page.html")["report"]["sites"][0]["site"] == HOSTILE
    assert "<script>alert(1)" not in (tmp_path / "page.html").read_text()


def test_json_text_is_ascii_where_it_matters():
    text = json_text(HOSTILE + "\ud800", "text")
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == HOSTILE + "?"  # half a surrogate is no text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}])
def test_what_json_cannot_carry_is_named(value):
    made = unmeasured()
    made["sites"][0]["sqnr"] = value
    with pytest.raises(QpassError, match="write null where nothing was measured"):
        write(made, os.devnull)


@pytest.mark.parametrize("name", ["missing/page.html", "."])
def test_a_path_that_cannot_be_written_is_named(tmp_path, name):
    with pytest.raises(QpassError, match=f"written to .*{re.escape(name)}"):
        write(document(0), f"{tmp_path}/{name}")


def test_what_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "page.html"
    path.write_text("old")
    made = document(1)
    made["graphs"][0]["levels"][-1]["nodes"][-1]["shape"] = float("nan")
    with pytest.raises(QpassError):
        write(made, path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["page.html"]


def test_deep_modules_become_one_node():
    found = merged(nodes(["", "a", "a.b", "a.b.c", "a.b", "a", "d.e"]), 2)
    assert [(n["id"], n["text"], n["inputs"]) for n in found] == [
        (0, "%0", []),
        (1, "%1", [0]),
        (2, "a.b: 3 operations", [1]),
        (5, "%5", [2]),
        (6, "d.e: 1 operation", [5]),
    ]
    assert (found[2]["module"], found[2]["op"]) == ("a", "b")


def test_collapsing_leaves_the_document_as_it_was():
    made = document(1)
    before = json.dumps(made)
    small = collapsed(made, 2)
    assert json.dumps(made) == before
    assert len(small["graphs"][0]["levels"][0]["nodes"]) < len(made["graphs"][0]["levels"][0]["nodes"])
    assert small["sites"] == made["sites"]


def test_a_million_nodes_are_refused_with_a_hint(tmp_path):
    """The same node a million times: what counts them must not copy them."""
    (one,) = nodes(["layers.0.mlp"])
    start = time.perf_counter()
    with pytest.raises(QpassError, match=r"1,000,000 nodes; .* depth=2"):
        write(with_nodes([one] * 1_000_000), tmp_path / "page.html")
    with pytest.raises(QpassError, match="no depth helps"):
        write(with_nodes([{**one, "module": ""}] * (NODES + 1)), tmp_path / "page.html", depth=1)
    assert time.perf_counter() - start < 10
    assert not os.listdir(tmp_path)


def test_what_is_too_large_fits_when_collapsed(tmp_path, monkeypatch):
    monkeypatch.setattr(collapse, "NODES", 100)
    made = with_nodes(nodes([f"layers.{i // 50}.mlp.{i % 7}" for i in range(4000)]))
    with pytest.raises(QpassError, match=r"4,000 nodes; .* at most 100"):
        write(made, tmp_path / "page.html")
    write(made, tmp_path / "page.html", depth=2)
    assert len(read(tmp_path / "page.html")["nodes-0-0"]) == 80


@pytest.mark.parametrize("depth", [0, -1, True, 1.5, "2"])
def test_a_depth_that_is_no_number_of_names_is_refused(depth):
    with pytest.raises(QpassError, match="expected a whole number of module names"):
        write(document(0), os.devnull, depth)
