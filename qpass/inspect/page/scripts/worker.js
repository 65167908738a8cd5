// Runs in a worker beside dagre. In: the open modules as nested boxes. Out: where each child of each lies, and the
// arrows' points. Boxes of one shape (a transformer's layers) are laid out once and kept.

const HEAD = 30;
const PAD = 14;
const kept = new Map();

function arrange(box, found) {
  for (const child of box.nodes) {
    if (child.nodes) Object.assign(child, sizeOf(arrange(child, found)));
  }
  const key = JSON.stringify([box.nodes.map((child) => [child.width, child.height]), box.edges, box.entries, box.exits, box.least]);
  if (!kept.has(key)) kept.set(key, layOut(box));
  found.set(box.key, kept.get(key));
  return kept.get(key);
}

function sizeOf(layout) {
  return { width: layout.width, height: layout.height };
}

function layOut(box) {
  const graph = new dagre.graphlib.Graph();
  graph.setGraph({ rankdir: "TB", nodesep: 16, ranksep: 26, edgesep: 8 });
  graph.setDefaultEdgeLabel(() => ({}));
  box.nodes.forEach((child, i) => graph.setNode(String(i), { width: child.width, height: child.height }));
  for (const [from, to] of box.edges) graph.setEdge(String(from), String(to), {});
  const port = { width: 6, height: 1 };
  if (box.entries.length) graph.setNode("in", { ...port });
  if (box.exits.length) graph.setNode("out", { ...port });
  for (const i of box.entries) graph.setEdge("in", String(i), {});
  for (const i of box.exits) graph.setEdge(String(i), "out", { weight: 2 });
  dagre.layout(graph);
  const top = box.key === "m" ? PAD : HEAD;
  const { width = 0, height = 0 } = graph.graph();
  const least = box.least || 0;
  const shift = PAD + Math.max(0, (least - width - 2 * PAD) / 2);
  const children = box.nodes.map((_, i) => {
    const at = graph.node(String(i));
    return { x: at.x - at.width / 2 + shift, y: at.y - at.height / 2 + top, width: at.width, height: at.height };
  });
  const edges = graph.edges().map((edge) => ({
    from: Number.isNaN(Number(edge.v)) ? -1 : Number(edge.v),
    to: Number.isNaN(Number(edge.w)) ? -1 : Number(edge.w),
    points: graph.edge(edge).points.flatMap((point) => [point.x + shift, point.y + top]),
  }));
  return { width: Math.max(width + 2 * PAD, least), height: height + top + PAD, children, edges };
}

function answer(request) {
  const found = new Map();
  arrange(request.box, found);
  return { number: request.number, layouts: found };
}

if (typeof WorkerGlobalScope !== "undefined") onmessage = (event) => postMessage(answer(event.data));
else globalThis.layOutHere = answer;
