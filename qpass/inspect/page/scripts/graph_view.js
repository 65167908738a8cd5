// The graph on the screen: only what is in sight has elements, so ten thousand nodes cost what a hundred do.

import { arrows, drawBox, drawOpen, spoken } from "./shapes.js";
import { createCamera } from "./camera.js";
import { nodesOf, report } from "./data.js";
import { byId, drawn, say } from "./dom.js";
import { everyModule, linkChildren } from "./edges.js";
import { layOutTree } from "./layout.js";
import { createMinimap } from "./minimap.js";
import { change, state } from "./state.js";
import { around, buildTree, openAtFirst } from "./tree.js";

const SMALLEST = 0.14; // zoom below which nodes are not drawn, only modules
const MODULE_PIXELS = 34;

/** What the graph shows: its tree, the open modules, where all lies, the box that the keys are on. */
export const view = { tree: null, open: new Set(), layouts: new Map(), active: null, shown: new Map(), camera: null };

const layers = {};
let elements = new Map();
let version = 0;
let drawings = new WeakMap();

/** Makes the canvas' elements; done once. */
export function startGraph() {
  const world = drawn("g", { class: "world" });
  for (const name of ["modules", "edges", "boxes", "marks"]) world.append((layers[name] = drawn("g", { class: name })));
  const svg = drawn("svg", { role: "group", "aria-label": "Nodes and modules" }, world);
  byId("canvas").append(svg);
  view.camera = createCamera(svg, world, paint);
  view.map = createMinimap(view);
  new ResizeObserver(paint).observe(svg);
  svg.addEventListener("click", (event) => {
    const key = event.target.closest("[data-key]")?.dataset.key;
    if (key) pick(view.shown.get(key).item, event.shiftKey);
  });
}

/** Shows a level from the beginning. keep: the modules that are open stay so where the level has them. */
export async function showLevel(keep) {
  const has = report.graphs.length > 0 && report.graphs[state.graph].levels.length > 0;
  byId("no-graph").hidden = has;
  byId("no-graph").textContent = has ? "" : "No graph was captured yet: call the model once, then write the report again.";
  if (!has) return;
  const before = view.active?.key;
  view.tree = buildTree(nodesOf(state.graph, state.level), state.parameters);
  linkChildren(view.tree);
  if (!keep) view.open = openAtFirst(view.tree.root);
  view.active = null;
  await arrange();
  if (!keep) showAll(false);
  const again = before && allItems().find((item) => item.key === before);
  if (again) activate(again);
}

function allItems() {
  return [...everyModule(view.tree.root)].flatMap((module) => module.children);
}

let latest = 0;

/** Lays out what is open, then draws; a later call makes an earlier one void. */
export async function arrange() {
  latest += 1;
  const own = latest;
  const slow = setTimeout(() => (byId("busy").hidden = false), 150);
  const layouts = await layOutTree(view.tree.root, view.open);
  clearTimeout(slow);
  if (own !== latest) return;
  byId("busy").hidden = true;
  view.layouts = layouts;
  repaint();
}

/** Shows the whole graph, or its top where the whole would be too small to read. */
export function showAll(animated = true, atLeast = 0.8) {
  const layout = view.layouts.get("m");
  if (layout) view.camera.fit({ x: 0, y: 0, width: layout.width, height: layout.height }, { atLeast, animated });
}

/** The rectangle of an item that is not inside a closed module. */
export function placeOf(item) {
  let [x, y, size] = [0, 0, null];
  for (let at = item; at.parent; at = at.parent) {
    const place = view.layouts.get(at.parent.key)?.children[at.parent.children.indexOf(at)];
    if (!place) return null;
    size ??= { width: place.width, height: place.height };
    x += place.x;
    y += place.y;
  }
  return { x, y, ...size };
}

/** Draws everything anew: colours, types or places are others now. */
export function repaint() {
  version += 1;
  paint();
}

function paint() {
  if (!view.layouts.size || !view.tree) return;
  const scale = view.camera.at.k;
  const seen = view.camera.seen(0.4);
  const wanted = new Map();
  view.shown = new Map();
  visit(view.tree.root, 0, 0, { scale, seen, wanted });
  const coarse = Math.round(Math.log2(scale) * 2);
  for (const [key, { stamp, layer, make }] of wanted) {
    const whole = `${stamp}|${version}${layer === "modules" ? `|${coarse}` : ""}`;
    const old = elements.get(key);
    if (old?.stamp === whole) continue;
    const made = make();
    if (old) old.element.replaceWith(made);
    else layers[layer].append(made);
    elements.set(key, { stamp: whole, element: made });
  }
  for (const [key, { element }] of elements) {
    if (wanted.has(key)) continue;
    element.remove();
    elements.delete(key);
  }
  mark();
  view.map();
}

function visit(module, left, top, look) {
  const layout = view.layouts.get(module.key);
  if (!layout) return;
  const { scale, seen, wanted } = look;
  layout.children.forEach((place, i) => {
    const [x, y] = [left + place.x, top + place.y];
    if (x > seen.right || y > seen.bottom || x + place.width < seen.x || y + place.height < seen.y) return;
    const item = module.children[i];
    if (!item.children && scale < SMALLEST) return;
    const open = view.open.has(item.key) && view.layouts.has(item.key);
    const box = { x, y, width: place.width, height: place.height };
    view.shown.set(item.key, { item, ...box, open });
    const make = () => described(open ? drawOpen(item, box, state.colour, scale) : drawBox(item, box, state.colour), item, open);
    const stamp = `${x},${y},${place.width},${place.height}`;
    wanted.set(`${item.key}${open ? "+" : ""}`, { stamp, layer: open ? "modules" : "boxes", make });
    if (open && place.height * scale > MODULE_PIXELS) visit(item, x, y, look);
  });
  if (scale < SMALLEST / 2) return;
  wanted.set(`e${module.key}`, { stamp: `${left},${top}`, layer: "edges", make: () => drawEdges(layout, left, top) });
}

function described(group, item, open) {
  group.setAttribute("data-key", item.key);
  group.setAttribute("id", `box-${item.key}`);
  group.setAttribute("role", "button");
  group.setAttribute("aria-label", spoken(item, open));
  if (item.children) group.setAttribute("aria-expanded", String(open));
  return group;
}

function drawEdges(layout, left, top) {
  if (!drawings.has(layout)) drawings.set(layout, arrows(layout));
  const { lines, heads } = drawings.get(layout);
  const at = { transform: `translate(${left},${top})` };
  return drawn("g", at, drawn("path", { class: "line", d: lines }), drawn("path", { class: "arrow", d: heads }));
}

function mark() {
  layers.marks.replaceChildren();
  const place = view.active && placeOf(view.active);
  byId("canvas").setAttribute("aria-activedescendant", place && view.shown.has(view.active.key) ? `box-${view.active.key}` : "");
  if (!place) return;
  const { parent } = view.active;
  const layout = view.layouts.get(parent.key);
  const corner = placeOf(parent) ?? { x: 0, y: 0 };
  const { lines, heads } = arrows(layout, parent.children.indexOf(view.active));
  layers.marks.append(
    drawn("g", { transform: parent.parent ? `translate(${corner.x},${corner.y})` : null },
      drawn("path", { class: "line", d: lines }), drawn("path", { class: "arrow", d: heads })),
    drawn("rect", { class: "ring", x: place.x - 3, y: place.y - 3, width: place.width + 6, height: place.height + 6, rx: 9 }),
  );
}

/** Puts the keys on a box and says what it is. */
export function activate(item) {
  view.active = item;
  mark();
  say(spoken(item, view.open.has(item.key)));
}

/** A click or Enter: a module opens or closes, a node shows its details. details: of the module, too. */
export function pick(item, details = false) {
  activate(item);
  if (!item.children) change({ chosen: { kind: "node", leaf: item } });
  else if (details) change({ chosen: { kind: "module", module: item } });
  else toggle(item);
}

/** Opens or closes a module; its top stays where it is on the screen. */
export async function toggle(module) {
  const before = placeOf(module);
  if (view.open.has(module.key)) view.open.delete(module.key);
  else view.open.add(module.key);
  await arrange();
  const after = placeOf(module);
  if (before && after) {
    const { x, y, k } = view.camera.at;
    const dx = (before.x + before.width / 2 - after.x - after.width / 2) * k;
    view.camera.go(d3.zoomIdentity.translate(x + dx, y + (before.y - after.y) * k).scale(k), false);
  }
  if (after) activate(module);
}

/** Opens all modules that a depth asks for: "none", "next" or "all". */
export async function openDepth(how) {
  const modules = [...everyModule(view.tree.root)].slice(1);
  const next = modules.filter((module) => module.parent === view.tree.root || view.open.has(module.parent.key));
  if (how === "none") view.open.clear();
  for (const module of how === "all" ? modules : how === "next" ? next : []) view.open.add(module.key);
  view.active = null;
  await arrange();
  showAll(true, how === "all" ? 0.5 : 0.8);
}

/** Opens what a box lies in, and brings it to the middle. */
export async function reveal(item) {
  const closed = around(item).filter((module) => !view.open.has(module.key));
  for (const module of closed) view.open.add(module.key);
  if (closed.length) await arrange();
  const place = placeOf(item);
  if (!place) return; // another level was chosen meanwhile
  activate(item);
  view.camera.centre(place);
  paint();
}
