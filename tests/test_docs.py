"""The documentation is true: its code runs, its links lead somewhere, its dumps are what the source makes today."""

import doctest
import importlib
import importlib.util
import pkgutil
import re
import sys
import types
from pathlib import Path

import pytest

import qpass
from qpass.backends import cpu
from qpass.passes import ORDER
from qpass.pipeline import CHOICES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "kernels/README.md", *sorted(DOCS.rglob("*.md"))]
CODE = re.compile(r"(?:<!-- needs ([\w. ]+) -->\n)?```python\n(.*?)```", re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.*)$", re.MULTILINE)
REFERENCE = re.compile(r"`((?:qpass|docs|tests|kernels)/[\w./-]*)`")
ABSENT = ("kernels/__init__.py",)  # named because it must not be there
VARIABLE = re.compile(r"QPASS_[A-Z]+")


def names(pages):
    return [str(page.relative_to(ROOT)) for page in pages]


def walk():
    spec = importlib.util.spec_from_file_location("walk", DOCS / "walk.py")
    module = sys.modules.setdefault("walk", importlib.util.module_from_spec(spec))
    if not hasattr(module, "DUMPS"):
        spec.loader.exec_module(module)
    return module


def lacking(needs):
    """The first package a block needs that is not installed here."""
    return next((name for name in needs.split() if importlib.util.find_spec(name.split(".")[0]) is None), None)


WITH_CODE = [page for page in PAGES if CODE.search(page.read_text())]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_CODE, ids=names(WITH_CODE))
def test_code_runs(page, tmp_path, monkeypatch):
    """The python blocks of a page, in order, as one program."""
    monkeypatch.chdir(tmp_path)
    name = f"page_{page.stem}"  # a page may be called as a module of Python is
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)  # where torch looks up what a page's functions name
    source = page.read_text()
    for found in CODE.finditer(source):
        if found[1] and lacking(found[1]):
            continue
        start = source[: found.start(2)].count("\n")
        exec(compile("\n" * start + found[2], str(page), "exec"), vars(module))


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text()):
        path, _, anchor = link.partition("#")
        if "://" in link:
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}"
        if anchor:
            heads = [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in HEADING.findall(target.read_text())]
            assert anchor in heads, f"{page.name} links to {link}"


@pytest.mark.parametrize("page", PAGES, ids=names(PAGES))
def test_files_that_are_named_exist(page):
    missing = [path for path in REFERENCE.findall(page.read_text()) if not (ROOT / path).exists()]
    assert [path for path in missing if path not in ABSENT] == []


def test_every_page_is_in_the_index():
    linked = {(DOCS / link).resolve() for link in LINK.findall((DOCS / "index.md").read_text())}
    missing = [page for page in DOCS.rglob("*.md") if page.name != "index.md" and page.resolve() not in linked]
    assert not missing


def test_every_pass_has_a_section():
    heads = HEADING.findall((DOCS / "passes.md").read_text())
    sections = [head for head in heads if head in {each.name for each in ORDER}]
    assert sections == [each.name for each in ORDER]


def test_every_environment_variable_is_documented():
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "qpass").rglob("*.py")))
    page = (DOCS / "debugging.md").read_text()
    known = set(VARIABLE.findall(sources))
    assert known == set(VARIABLE.findall(page)) >= {name for name, _ in CHOICES}
    for _, choices in CHOICES:
        assert all(f"`{choice}`" in page for choice in choices if choice)


def test_every_level_and_public_name_is_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    levels = (DOCS / "levels.md").read_text()
    assert all(f"\n## {level}\n" in levels for level in ("float", "annotated", "qdq", "fused", "lowered"))
    hidden = {"QpassError", "Decision", "ops", "Recipe", "qpass_backend"}  # met in messages and in the source
    missing = [name for name in qpass.__all__ if name not in hidden and not re.search(rf"\bqpass\.{name}\b", text)]
    assert not missing


def modules():
    return [name for _, name, _ in pkgutil.walk_packages([str(ROOT / "qpass")], "qpass.") if name != "qpass.__main__"]


def test_doctests_of_the_source():
    results = [doctest.testmod(importlib.import_module(name), verbose=False) for name in modules()]
    assert sum(result.failed for result in results) == 0
    assert sum(result.attempted for result in results) >= 10


def documented_dumps():
    pages = [page for page in sorted(DOCS.glob("*.md")) if "<!-- dump" in page.read_text()]
    return [(page, name) for page in pages for name in walk().blocks(page)]


@pytest.mark.parametrize(("page", "name"), documented_dumps(), ids=lambda v: v.stem if isinstance(v, Path) else v)
def test_dumps_are_what_the_source_makes(page, name):
    """Run `python docs/walk.py` after a change of the source that is meant to change them."""
    if cpu.saturates():
        pytest.skip("lowered graphs are written down for processors that multiply u8 by i8 exactly")
    if name in walk().OF_THE_MACHINE and walk().like_written():
        pytest.skip(f"lowered graphs are written down for the native kernels: {walk().like_written()}")
    made, written = walk().DUMPS[name](), walk().blocks(page)[name]
    if name == "instruction":  # compilers differ
        assert written.count(walk().VNNI) >= 4
        assert walk().VNNI in made or "no objdump" in made
        return
    assert walk().normal(made) == walk().normal(written)


TWO = [name for page, name in documented_dumps() if page.stem == "training"]
ENDS = "w2a2, trained"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def figures(text):
    """(the words of a dump, its numbers); without bars."""
    text = re.sub("[▏▎▍▌▋▊▉█]", "", text)
    return NUMBER.sub("#", text).split(), [float(n) for n in NUMBER.findall(text)]


@pytest.mark.parametrize("name", TWO)
def test_figures_of_the_two_layers(name):
    """Every number of the example is that of the page, to 1 % and one in the last digit.

    But where 2 bits end: which codes that are hangs on the last digit of sums, and so on the processor (1.48 and 1.61 of
    float's loss were seen). There training has to be as far from where it began.
    """
    made, page = walk().DUMPS[name](), walk().blocks(DOCS / "training.md")[name]
    words, numbers = figures("\n".join(line for line in made.splitlines() if not line.startswith(ENDS)))
    written_words, written = figures("\n".join(line for line in page.splitlines() if not line.startswith(ENDS)))
    assert words == written_words
    assert numbers == pytest.approx(written, rel=0.01, abs=0.011)
    ends = [[float(line.split()[-1]) for line in text.splitlines() if line.startswith(ENDS)] for text in (made, page)]
    assert len(ends[0]) == len(ends[1])
    assert all(1 < end < 1.7 for end in ends[0])  # 1.87 where it begins


def test_two_layers_reach_float():
    """At w4a4 rounding costs a tenth of the loss, training wins it back, and compile keeps what was trained."""
    two = walk().two
    found = two.figures(two.run(two.SEED))
    for mine, base in zip(found["w4a4, trained"], found["float"], strict=True):
        assert mine < 1.01 * base
    for mine, base in zip(found["w4a4, to nearest: where training begins"], found["float"], strict=True):
        assert mine > 1.10 * base
    for scheme in two.SCHEMES:
        name = scheme.removesuffix("-c")
        assert found[f"{name}, trained and compiled"] == pytest.approx(found[f"{name}, trained"], rel=1e-5)
        assert found[f"{name}, trained"][1] < found[f"{name}, qpass.compile without training"][1]
        assert two.apart(two.run(two.SEED), scheme) < 1e-6


def test_two_layers_as_a_program(monkeypatch, capsys, tmp_path):
    two = walk().two
    monkeypatch.setattr(sys, "argv", ["train_two_layers.py"])
    two.main()
    printed = capsys.readouterr().out
    assert all(f"## {title}\n" in printed for title in two.PARTS)
    assert two.validated(two.run(two.SEED)) in printed
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="pip install matplotlib"):
        two.plot(two.run(two.SEED), tmp_path / "curve.png")


def test_a_dump_that_is_not_true_is_noticed():
    normal = walk().normal
    assert normal("%1 = aten.gelu(%0)   # float32[s33, 8]") == normal("%1 = aten.gelu(%0) # float32[s0, 8]")
    assert normal("f(%1, 0.25, 128, uint8)") == normal("f(%1, 0.26, 127, uint8)")
    assert normal("%1 = aten.gelu(%0)") != normal("%1 = aten.relu(%0)")
    assert normal("float32[s0, 8]") != normal("float32[s0, 9]")
