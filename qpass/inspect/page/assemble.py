"""The page's text: a template, styles, scripts and libraries from the files beside this one, and the document as data.

The scripts are ES modules. Their imports are dropped and all stand in one function, in the order of SCRIPTS: each file
imports only from those before it, and every name at the top of a file is the only one of that name.
"""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from qpass.inspect.page.embed import json_text, script

FOLDER = Path(__file__).parent

STYLES = ("tokens", "layout", "summary", "graph", "table", "compare", "details", "print")
SCRIPTS = (
    "dom", "format", "data", "state", "theme", "tree", "edges", "values", "colours", "camera", "shapes", "layout", "minimap",
    "graph_view", "graph_keys", "legend", "search_index", "search_box", "rows", "site_table", "align", "compare_view",
    "charts", "site_details", "node_details", "summary", "tabs", "main",
)  # fmt: skip
LIBRARIES = ("d3", "dagre")

IMPORT = re.compile(r"^import [^;]*;\n", re.MULTILINE)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function|const|let|class)\b)", re.MULTILINE)
SOURCE_MAP = re.compile(r"^//# sourceMappingURL=.*$", re.MULTILINE)


def pieces(document: dict[str, Any]) -> Iterator[str]:
    """The page in pieces, ready to be written one after another."""
    report, levels = _apart(document)
    head, middle, end = _template()
    title = html.escape(f"{document['summary']['model']} {document['summary']['scheme']} - qpass report")
    yield head.replace("$title", title)
    yield script("report", "application/json", json_text(report, "a part"))
    for name, nodes in levels:
        yield script(name, "application/json", json_text(nodes, f"level {name}"))
    yield middle
    yield end


def _apart(document: dict[str, Any]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """The document without the nodes of its levels, and those, each under a name of its own: read when shown."""
    graphs, levels = [], []
    for g, graph in enumerate(document["graphs"]):
        named = [{**level, "nodes": len(level["nodes"])} for level in graph["levels"]]
        graphs.append({**graph, "levels": named})
        levels += [(f"nodes-{g}-{i}", level["nodes"]) for i, level in enumerate(graph["levels"])]
    return {**document, "graphs": graphs}, levels


@cache
def _template() -> tuple[str, str, str]:
    """What stands before the data, and the two halves of what stands behind it."""
    d3, dagre = (SOURCE_MAP.sub("", _read(f"vendor/{name}.min.js")) for name in LIBRARIES)
    style, program = styles(), program_text()
    policy = (
        f"default-src 'none'; script-src {_digest(d3)} {_digest(program)} blob:; worker-src blob:; "
        f"style-src {_digest(style)}; img-src data:; form-action 'none'; base-uri 'none'"
    )
    head, body = _read("template.html").split("<!-- data -->\n")
    head = head.replace("$policy", policy).replace("$style", style)
    licences = "\n\n".join(f"{name}\n\n{_read(f'vendor/{name}.LICENSE')}" for name in LIBRARIES)
    middle = script("licences", "text/plain", licences) + script("dagre", "text/plain", dagre)
    middle += script("layout-worker", "text/plain", _read("scripts/worker.js"))
    return head, middle, f"<script>{d3}</script>\n<script>{program}</script>\n{body}"


def styles() -> str:
    """All style sheets as one."""
    return "".join(_read(f"styles/{name}.css") for name in STYLES)


def program_text() -> str:
    """All scripts as one function."""
    parts = [EXPORT.sub("", IMPORT.sub("", _read(f"scripts/{name}.js"))) for name in SCRIPTS]
    return '"use strict";\n(() => {\n' + "\n".join(parts) + "\n})();\n"


def _read(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8").replace("\r\n", "\n")


def _digest(text: str) -> str:
    """A Content-Security-Policy source that allows exactly this text."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
