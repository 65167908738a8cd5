"""A level's graph for other programs: DOT, for Graphviz, and GraphML, for yEd, Gephi or networkx."""

from __future__ import annotations

import io

from qpass.errors import QpassError, nearest
from qpass.inspect.document import check_size
from qpass.inspect.levels import LevelNode, collapsed, last_of_levels, nodes
from qpass.served import Record

SHAPES = {"input": "ellipse", "parameter": "note", "call": "box", "output": "ellipse"}


def at_level(record: Record, level: str, depth: int | None = None) -> list[LevelNode]:
    """The nodes of a graph at the end of a level; depth: collapsed to modules so many names deep."""
    steps = {step.level: step for step in last_of_levels(record.steps)}
    if level not in steps:
        raise QpassError(f"{level!r} is no level; expected one of {', '.join(steps)}.{nearest(level, steps)}")
    if depth is None:
        check_size(record, steps[level])
    elif depth < 1:
        raise QpassError(f"depth={depth} is not a positive number of names in a module's path.")
    found = nodes(steps[level])
    return found if depth is None else collapsed(found, depth)


def dot(found: list[LevelNode]) -> str:
    """The graph in the language of Graphviz; sites are filled."""
    lines = ["digraph qpass {", '  node [fontname="monospace", fontsize=9];']
    for node in found:
        label = "\\n".join(_escaped(part) for part in (node.op, node.site or node.module or node.text) if part)
        fill = ', style=filled, fillcolor="#cfe3f5"' if node.site else ""
        lines.append(f'  n{node.id} [shape={SHAPES[node.kind]}, label="{label}"{fill}];')
    lines += [f"  n{source} -> n{node.id};" for node in found for source in node.inputs]
    return "\n".join([*lines, "}"])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


def graphml(found: list[LevelNode]) -> str:
    """The graph as GraphML; each node with what is known of it as text."""
    import networkx  # a tenth of a second to import

    graph = networkx.DiGraph()
    for node in found:
        shape = "" if node.shape is None else "[" + ", ".join(map(str, node.shape)) + "]"
        known = {"kind": node.kind, "op": node.op, "text": node.text, "module": node.module, "shape": shape}
        known |= {"site": node.site or "", "rule": node.rule or "", "dtype": node.dtype or ""}
        graph.add_node(node.id, **{key: _plain(value) for key, value in known.items()})
    graph.add_edges_from((source, node.id) for node in found for source in node.inputs)
    out = io.BytesIO()
    networkx.write_graphml(graph, out)
    return out.getvalue().decode()


def _plain(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() else "?" for c in text)
