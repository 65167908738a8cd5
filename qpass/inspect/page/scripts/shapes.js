// How a node, a closed module and an open one look: their words, sizes and elements.

import { typesOf } from "./data.js";
import { drawn } from "./dom.js";
import { plural, shape } from "./format.js";
import { figureColour, inkOn, typeColour } from "./colours.js";
import { MODES, typeCounts } from "./values.js";

const HEIGHT = 42;
const BAR = 5;
const pen = document.createElement("canvas").getContext("2d");
const widths = new Map();

function widthOf(text, font) {
  const key = font + text;
  if (!widths.has(key)) {
    pen.font = font;
    widths.set(key, pen.measureText(text).width);
  }
  return widths.get(key);
}

/** The two lines of a box. */
export function words(item) {
  if (item.children) {
    const sites = item.sites.length ? ` · ${plural(item.sites.length, "site")}` : "";
    return [item.name, plural(item.operations, "op") + sites];
  }
  const { op, kind, text, shape: size } = item.node;
  const named = op === kind ? text : op; // an input of the graph is best told by its value's name
  const short = cut(named.replace(/^aten\./, ""), 34);
  const more = cut(item.sites.length ? typesOf(item.sites[0]) : shape(size), 34);
  return item.name ? [item.name, `${short}, ${more}`] : [short, more];
}

function cut(text, most) {
  return text.length > most ? `…${text.slice(1 - most)}` : text;
}

/** Width and height of a node or a closed module. */
export function boxSize(item) {
  if (!item.size) {
    const [first, second] = words(item);
    const text = Math.max(widthOf(first, "600 13px system-ui"), widthOf(second, "11px system-ui"));
    item.size = { width: Math.ceil(text) + (item.children ? 58 : 30), height: HEIGHT };
  }
  return item.size;
}

/** What is said of a box to those who do not see it: what it shows, then where it belongs. */
export function spoken(item, open) {
  const [first, second] = words(item);
  if (item.children) return `${first} ${second}, module ${item.path}, ${open ? "open" : "closed"}`;
  return `${first} ${second}, ${item.node.op} of ${item.node.site || item.node.module || "the model"}`;
}

/** A group of elements for a box at [x, y]: a node, a closed module. */
export function drawBox(item, { x, y, width, height }, mode) {
  const figure = mode === "type" ? null : MODES[mode].of(item.sites);
  const fill = figureColour(mode, figure);
  const [first, second] = words(item);
  const left = BAR + 9;
  const ink = fill ? { fill: inkOn(fill) } : {};
  const float = item.sites.length > 0 && item.sites.every((site) => !site.quantized);
  const kind = item.children ? "module" : item.node.kind;
  return drawn(
    "g",
    { class: `box ${kind}${float ? " float" : ""}`, transform: `translate(${x},${y})` },
    item.children ? drawn("rect", { class: "behind", x: 4, y: 4, width, height, rx: 7 }) : null,
    drawn("rect", { class: "body", width, height, rx: item.children ? 7 : 5, style: fill ? { fill } : {} }),
    ...(mode === "type" ? typeBars(item, width, height) : []),
    drawn("text", { class: "first", x: left, y: 18, text: first, style: ink }),
    " ",
    drawn("text", { class: "second", x: left, y: 33, text: second, style: ink }),
    item.children ? drawn("path", { class: "plus", d: `M${width - 20} 16h9m-4.5-4.5v9`, style: fill ? { stroke: inkOn(fill) } : {} }) : null,
  );
}

function typeBars(item, width, height) {
  if (!item.children) {
    const colour = item.sites.length ? typeColour(typesOf(item.sites[0])) : null;
    if (!colour) return [];
    return [
      drawn("rect", { class: "tint", width, height, rx: 5, style: { fill: colour } }),
      drawn("path", { d: `M5 0H${BAR}V${height}H5a5 5 0 0 1-5-5V5a5 5 0 0 1 5-5`, style: { fill: colour } }),
    ];
  }
  const share = (width - 16) / (item.sites.length || 1);
  let x = 8;
  return typeCounts(item.sites).map(([text, n]) => {
    const bar = drawn("rect", { x, y: height - 4, width: n * share, height: 3, style: { fill: typeColour(text) } });
    x += n * share;
    return bar;
  });
}

/** A group of elements for an open module. */
export function drawOpen(item, { x, y, width, height }, mode, scale) {
  const figure = mode === "type" ? null : MODES[mode].of(item.sites);
  const fill = figureColour(mode, figure);
  const text = item.name || "model";
  const roomy = (width - 56) / Math.max(widthOf(text, "600 13px system-ui"), 1);
  const size = 13 * Math.max(1, Math.min(1 / scale, roomy, height / 60));
  return drawn(
    "g",
    { class: `open depth${item.depth % 2}`, transform: `translate(${x},${y})` },
    drawn("rect", { class: "body", width, height, rx: 9 }),
    drawn("rect", { class: "head", width, height: 24, rx: 9 }),
    fill ? drawn("rect", { x: 10, y: 7, width: 10, height: 10, rx: 2, style: { fill } }) : null,
    drawn("text", { class: "name", x: fill ? 26 : 12, y: 4 + size, text, style: { "font-size": `${size}px` } }),
    drawn("path", { class: "plus", d: `M${width - 20} 12h9` }),
  );
}

/** The `d` of all arrows of a layout, and of their heads. only: of those that touch this child. */
export function arrows(layout, only = null) {
  const lines = [];
  const heads = [];
  for (const { from, to, points } of layout.edges) {
    if (only !== null && from !== only && to !== only) continue;
    lines.push(curve(points));
    if (to >= 0) heads.push(headAt(points));
    if (from < 0) heads.push(dotAt(points.slice(0, 2)));
    if (to < 0) heads.push(dotAt(points.slice(-2)));
  }
  return { lines: lines.join(""), heads: heads.join("") };
}

function curve(points) {
  const line = d3.line().curve(d3.curveBasis);
  const pairs = [];
  for (let i = 0; i < points.length; i += 2) pairs.push([points[i], points[i + 1]]);
  return line(pairs);
}

/** Where an arrow comes in from outside its module, or leaves it. */
function dotAt([x, y]) {
  return `M${x - 3} ${y}a3 3 0 1 0 6 0a3 3 0 1 0-6 0Z`;
}

function headAt(points) {
  const [x0, y0, x, y] = points.slice(-4);
  const length = Math.hypot(x - x0, y - y0) || 1;
  const [ux, uy] = [(x - x0) / length, (y - y0) / length];
  const [bx, by] = [x - 7 * ux, y - 7 * uy];
  return `M${x} ${y}L${bx - 3 * uy} ${by + 3 * ux}L${bx + 3 * uy} ${by - 3 * ux}Z`;
}
