"""Who may import whom: the layers of the source, held by reading every import statement.

A module imports from its own layer or a lower one, and modules of one layer never in a circle. An import inside a
function counts like any other unless LAZY names it. What Python runs on the way (`qpass.passes` before
`qpass.passes.fuse`) does not count, only what a file says.
"""

import ast
import subprocess
import sys
from pathlib import Path

import networkx
import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down; a package stands for all its modules, "" for qpass/__init__.py.
# fmt: off
LAYERS = (
    ("", "__main__", "api", "backend_entry", "cli", "demo", "interchange", "legacy", "persist", "prepare",
     "texts"),
    ("search",),
    ("inspect", "serving"),
    ("bits", "calibrate", "calls", "checks", "decide", "decide_conv", "decide_linear", "decide_nested", "decide_site",
     "decide_tables", "in_place", "module_sites", "planning", "profit", "qat", "resume", "runtime", "self_watched",
     "sequential", "served", "simulate", "timing", "walk", "watch"),
    ("passes", "backends", "solvers"),
    ("pipeline", "verify"),
    ("canonical", "capture", "convolutions", "frames", "graph_text", "graphs", "guards", "install", "products", "rewrite",
     "sites", "slices", "source_lines", "trained"),
    ("conv_ops", "nested", "nested_ops", "observations", "ops", "packing", "padding", "patches", "plan",
     "schemes", "shards", "shared", "site_info", "storage"),
    ("affine", "arity", "geometry", "histogram", "nested_words", "qparams", "qtype", "range_choice", "ranges", "scheme_words",
     "seen", "sizes"),
    ("errors", "files", "interrupts", "memory", "processes"),
)
# fmt: on

# Imports inside a function that the layers do not count: importer, imported, why.
LAZY = (
    ("qpass.backends", "qpass.backends.cpu", "a backend is made of the type that its package defines"),
    ("qpass.backends", "qpass.backends.reference", "the same"),
    ("qpass.backends", "qpass.backends.triton", "the same"),
    ("qpass.plan", "qpass.storage", "a plan saves itself; the file format reads plans"),
)

KERNEL_USER = "qpass.backends.triton.package"
KERNELS_MAY_IMPORT = {"torch", "triton", "qpass_kernels", *sys.stdlib_module_names}
NOT_AT_IMPORT = ("triton", "transformers", "torch._inductor", "qpass_kernels")

LONGEST = 250
LONGER: tuple[tuple[str, str], ...] = ()  # path, why it may be longer

OURS_IN_IMPORT = 0.1  # of what `import torch` takes
EPSILON = 0.05  # seconds beside that share


def read(folder):
    """Module name -> source text, for every file under ROOT/folder."""
    base = (ROOT / folder).parent
    files = sorted((ROOT / folder).rglob("*.py"))
    return {".".join(f.relative_to(base).with_suffix("").parts).removesuffix(".__init__"): f.read_text() for f in files}


def imports(module, sources):
    """(imported module, inside a function, line) of every import; `from qpass import ops` is an import of qpass.ops."""
    tree = ast.parse(sources[module])
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    inside = {id(n) for f in functions for n in ast.walk(f)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{a.name}" if f"{base}.{a.name}" in sources else base for a in node.names]
        else:
            continue
        yield from ((name, id(node) in inside, node.lineno) for name in names)


def layer(module):
    """Index of a module's layer in LAYERS, or None."""
    own = module.removeprefix("qpass").removeprefix(".")
    return next((i for i, names in enumerate(LAYERS) if own in names or own.split(".")[0] in names), None)


def unlisted(sources):
    return [
        f"{module} is in no layer: add it to LAYERS in tests/test_layers.py, as low as its imports allow"
        for module in sources
        if layer(module) is None
    ]


def counted(sources):
    """(importer, imported, line) of every import within qpass that the layers count."""
    lazy = {row[:2] for row in LAZY}
    for module in sources:
        for name, inside, line in imports(module, sources):
            if name in sources and not (inside and (module, name) in lazy):
                yield module, name, line


def upward(sources):
    listed = [(a, b, line) for a, b, line in counted(sources) if None not in (layer(a), layer(b))]
    return [
        f"{a}, line {line}: imports {b}, which is in a higher layer ({', '.join(n or 'qpass' for n in LAYERS[layer(b)])})"
        for a, b, line in listed
        if layer(b) < layer(a)
    ]


def circles(sources):
    graph = networkx.DiGraph((a, b) for a, b, _ in counted(sources))
    return [" > ".join([*circle, circle[0]]) for circle in networkx.simple_cycles(graph)]


def relative(sources):
    return [
        f"{module}, line {line}: a relative import; write `from qpass.x import y`"
        for module in sources
        for name, _, line in imports(module, sources)
        if name.startswith(".")
    ]


def kernel_users(sources):
    """qpass_kernels is imported by one file, inside a function."""
    return [
        f"{module}, line {line}: only {KERNEL_USER} imports qpass_kernels, inside a function"
        for module in sources
        for name, inside, line in imports(module, sources)
        if name.split(".")[0] == "qpass_kernels" and not (inside and module == KERNEL_USER)
    ]


def kernel_imports(sources):
    return [
        f"{module}, line {line}: imports {name}; qpass_kernels imports torch, triton and the standard library only"
        for module in sources
        for name, _, line in imports(module, sources)
        if name.split(".")[0] not in KERNELS_MAY_IMPORT
    ]


# rule, a tree that breaks it (each file once)
BROKEN = (
    (unlisted, {"qpass.nowhere": ""}),
    (upward, {"qpass.errors": "from qpass.qtype import QType", "qpass.qtype": ""}),
    (upward, {"qpass.ops": "def f():\n    import qpass.passes.fuse", "qpass.passes.fuse": ""}),
    (upward, {"qpass.plan": "from qpass import api", "qpass.api": "", "qpass": ""}),
    (
        circles,
        {"qpass.qtype": "import qpass.affine", "qpass.affine": "def f():\n    from qpass import qtype"},
    ),
    (circles, {"qpass.plan": "import qpass.storage", "qpass.storage": "import qpass.plan"}),
    (relative, {"qpass.qtype": "from . import affine"}),
    (kernel_users, {"qpass.backends.cpu": "def f():\n    import qpass_kernels"}),
    (kernel_users, {KERNEL_USER: "import qpass_kernels.matmul"}),
    (kernel_imports, {"qpass_kernels.matmul": "import numpy"}),
    (kernel_imports, {"qpass_kernels.matmul": "def f():\n    from qpass.ops import linear"}),
)


@pytest.mark.parametrize("rule", [unlisted, upward, circles, relative, kernel_users], ids=lambda r: r.__name__)
def test_source(rule):
    broken = rule(read("qpass"))
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("rule", [relative, kernel_imports], ids=lambda r: r.__name__)
def test_kernels(rule):
    broken = rule(read("kernels/qpass_kernels"))
    assert not broken, "\n".join(broken)
    assert not (ROOT / "kernels/__init__.py").exists(), "a package called `kernels` breaks transformers"


@pytest.mark.parametrize(
    ("rule", "sources"), BROKEN, ids=[f"{i}-{rule.__name__}" for i, (rule, _) in enumerate(BROKEN)]
)
def test_a_rule_sees_what_breaks_it(rule, sources):
    assert len(rule(sources)) == 1


def test_lazy_imports_are_still_there():
    sources = read("qpass")
    found = {(m, name) for m in sources for name, inside, _ in imports(m, sources) if inside}
    stale = [row for row in LAZY if row[:2] not in found]
    assert not stale, f"LAZY allows imports that no function makes any more; remove the rows {stale}"


def test_no_file_is_too_long():
    files = [f for folder in ("qpass", "kernels", "tests") for f in sorted((ROOT / folder).rglob("*.py"))]
    lengths = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in files}
    allowed = {path for path, _ in LONGER}
    broken = [f"{path} has {n} lines" for path, n in lengths.items() if n > LONGEST and path not in allowed]
    assert not broken, f"split what is over {LONGEST} lines, or add it to LONGER with the reason:\n" + "\n".join(broken)


def python(code):
    """What a fresh interpreter prints."""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True, timeout=120
    )
    return done.stdout.split()


def test_import_stays_light():
    seen = "import sys; print(*(m for m in {!r} if m in sys.modules))"
    before, after = (python(f"import {name}; {seen.format(NOT_AT_IMPORT)}") for name in ("torch", "qpass"))
    extra = sorted(set(after) - set(before))
    assert not extra, f"`import qpass` imports {', '.join(extra)}; import it inside the function that needs it"


@pytest.mark.slow
def test_import_is_quick():
    """The quickest of five, in processor time: other processes share the machine, and only ever add."""
    python("import qpass")  # byte code and disk cache
    timed = (
        "import gc; from time import process_time as now; start = now(); import torch; spent = now() - start; "
        "gc.freeze()  # a collection would go through all of torch\nbetween = now(); import qpass; "
        "print(spent, now() - between)"
    )
    times = [[float(seconds) for seconds in python(timed)] for _ in range(5)]
    torch_takes, ours = (min(lap) for lap in zip(*times, strict=True))
    assert ours <= torch_takes * OURS_IN_IMPORT + EPSILON, (
        f"import qpass takes {ours:.2f} s after torch's {torch_takes:.2f} s; "
        "python -X importtime -c 'import torch, qpass' shows where it goes"
    )
