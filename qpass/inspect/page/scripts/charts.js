// Small pictures of one site: a histogram with the integers' grid, ranges of channels, float against quantized.

import { drawn } from "./dom.js";
import { number, plural, whole } from "./format.js";

const WIDTH = 372;
const MARGIN = { left: 44, right: 10, top: 8, bottom: 22 };

function frame(height, label, x, y, ...content) {
  const below = height - MARGIN.bottom;
  const ticksX = x.ticks(5).map((value) =>
    drawn("g", { class: "tick", transform: `translate(${x(value)},${below})` }, drawn("path", { d: "M0 0v4" }), drawn("text", { y: 16, "text-anchor": "middle", text: tickText(value) })),
  );
  const ticksY = (y ? y.ticks(3) : []).map((value) =>
    drawn("g", { class: "tick", transform: `translate(${MARGIN.left},${y(value)})` }, drawn("path", { class: "rule", d: `M0 0H${WIDTH - MARGIN.left - MARGIN.right}` }), drawn("text", { x: -6, y: 4, "text-anchor": "end", text: tickText(value) })),
  );
  const axis = drawn("path", { class: "axis", d: `M${MARGIN.left} ${below}H${WIDTH - MARGIN.right}` });
  return drawn("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${height}`, role: "img", "aria-label": label }, ...ticksY, ...content, axis, ...ticksX);
}

function tickText(value) {
  const size = Math.abs(value);
  return size >= 1e4 || (size > 0 && size < 1e-3) ? number(value, 2) : String(+value.toPrecision(6)).replace("-", "−");
}

/** The least and largest integer of a type's text, or null: "u8/t" has 0 and 255. */
export function codesOf(type) {
  const found = /^([ui])(\d+)/.exec(type ?? "");
  if (!found) return null;
  const bits = Number(found[2]);
  return found[1] === "u" ? [0, 2 ** bits - 1] : [1 - 2 ** (bits - 1), 2 ** (bits - 1) - 1];
}

/** A histogram; grid: { low, high, step } of the values that the integers stand for, drawn over it. */
export function histogram({ lo, hi, counts }, grid, name) {
  const height = 150;
  const [left, right] = grid ? [Math.min(lo, grid.low), Math.max(hi, grid.high)] : [lo, hi];
  const spread = right > left ? [left, right] : [left - 1, right + 1];
  const x = d3.scaleLinear(spread, [MARGIN.left, WIDTH - MARGIN.right]);
  const y = d3.scaleSqrt([0, d3.max(counts) || 1], [height - MARGIN.bottom, MARGIN.top]);
  const width = (hi - lo || 1) / counts.length;
  const bars = counts.map((n, i) => {
    const [from, to] = [x(lo + i * width), x(lo + (i + 1) * width)];
    const middle = lo + (i + 0.5) * width;
    const outside = grid && (middle < grid.low || middle > grid.high);
    return n > 0 && drawn("rect", { class: outside ? "bar outside" : "bar", x: from, width: Math.max(to - from - 0.5, 0.5), y: Math.min(y(n), y(0) - 1), height: Math.max(y(0) - y(n), 1) });
  });
  const lines = grid ? gridLines(grid, x, height) : [];
  const said = `${name}: ${plural(d3.sum(counts), "value")} from ${number(lo)} to ${number(hi)}` + (grid ? `; integers reach from ${number(grid.low)} to ${number(grid.high)}` : "");
  return frame(height, said, x, y, ...bars.filter(Boolean), ...lines);
}

function gridLines({ low, high, step }, x, height) {
  const [top, bottom] = [MARGIN.top, height - MARGIN.bottom];
  const every = ticksApart(x(low + step) - x(low));
  let path = "";
  for (let i = 0; i <= Math.round((high - low) / step); i += every) path += `M${x(low + i * step)} ${bottom}v-${every === 1 ? 14 : 9}`;
  return [
    drawn("rect", { class: "reach", x: x(low), y: top, width: Math.max(x(high) - x(low), 0), height: bottom - top }),
    drawn("path", { class: "grid", d: path }),
    drawn("path", { class: "limit", d: `M${x(low)} ${top}V${bottom}M${x(high)} ${top}V${bottom}` }),
  ];
}

function ticksApart(pixels) {
  return 2 ** Math.max(0, Math.ceil(Math.log2(5 / Math.max(pixels, 1e-6))));
}

/** How the grid over a histogram is to be read. */
export function gridNote({ lo, hi }, { low, high, step }) {
  const n = Math.round((high - low) / step) + 1;
  const pixels = ((WIDTH - MARGIN.left - MARGIN.right) * step) / (Math.max(hi, high) - Math.min(lo, low));
  const every = ticksApart(pixels);
  const ticks = every === 1 ? "a tick for each" : `a tick for every ${whole(every)}`;
  return `${whole(n)} integers, ${number(step)} apart, reach from ${number(low)} to ${number(high)}: ${ticks}. Heights grow with the root of the counts.`;
}

/** The range of each channel of a weight as a bar, with the reach of its integers behind. */
export function channels({ lo, hi, scale, of }, type) {
  const height = 150;
  const codes = codesOf(type);
  const symmetric = codes && codes[0] < 0;
  const reach = symmetric && scale?.length === lo.length ? scale.map((s) => s * codes[1]) : null;
  const y = d3.scaleLinear([Math.min(d3.min(lo), 0), Math.max(d3.max(hi), 0)], [height - MARGIN.bottom, MARGIN.top]).nice();
  const x = d3.scaleLinear([0, of ?? lo.length], [MARGIN.left, WIDTH - MARGIN.right]);
  const wide = (WIDTH - MARGIN.left - MARGIN.right) / lo.length;
  const clamp = (value) => Math.max(MARGIN.top, Math.min(height - MARGIN.bottom, y(value)));
  const at = (i) => MARGIN.left + i * wide;
  const bars = lo.map((low, i) => `M${at(i) + wide / 2} ${y(hi[i])}V${Math.max(y(low), y(hi[i]) + 1)}`).join("");
  const band = reach ? reach.map((r, i) => `M${at(i)} ${clamp(r)}h${wide}V${clamp(-r)}h-${wide}z`).join("") : "";
  const said = `Weights of ${plural(of ?? lo.length, "channel")}: from ${number(d3.min(lo))} to ${number(d3.max(hi))}`;
  const stroke = { "stroke-width": `${Math.max(wide * 0.7, 0.6)}px` };
  return frame(height, said, x, y, drawn("path", { class: "band", d: band }), drawn("path", { class: "span", d: bars, style: stroke }));
}

/** Quantized outputs over float ones; on the diagonal nothing was lost. */
export function scatter(pairs) {
  const height = 220;
  const all = [...pairs.float, ...pairs.quantized];
  const domain = all.length ? d3.extent(all) : [0, 1];
  const spread = domain[0] < domain[1] ? domain : [domain[0] - 1, domain[1] + 1];
  const x = d3.scaleLinear(spread, [MARGIN.left, WIDTH - MARGIN.right]).nice();
  const y = d3.scaleLinear(spread, [height - MARGIN.bottom, MARGIN.top]).nice();
  const [from, to] = x.domain();
  const points = pairs.float.map((value, i) => drawn("circle", { cx: x(value), cy: y(pairs.quantized[i]), r: 2.6 }));
  const diagonal = drawn("path", { class: "diagonal", d: `M${x(from)} ${y(from)}L${x(to)} ${y(to)}` });
  return frame(height, `${plural(points.length, "output value")}, quantized over float`, x, y, diagonal, ...points);
}

/** The least loss at each cost, with a ring where the recipe was chosen; the losses by their logarithm. */
export function frontChart({ unit: kind, metric, points, chosen }) {
  const height = 190;
  const here = chosen.loss ?? chosen.predicted;
  const costs = [...points.map((point) => point.cost), chosen.cost];
  const losses = [...points.map((point) => point.loss), here].filter((loss) => loss > 0);
  const [low, high] = losses.length ? d3.extent(losses) : [1, 10];
  const x = d3.scaleLinear(d3.extent(costs), [MARGIN.left, WIDTH - MARGIN.right]).nice();
  const y = d3.scaleLog(low < high ? [low, high] : [low / 2, low * 2], [height - MARGIN.bottom, MARGIN.top]).clamp(true);
  const at = (loss) => y(Math.max(loss, low));
  const line = points.map((point, i) => `${i ? "L" : "M"}${x(point.cost)} ${at(point.loss)}`).join("");
  const dots = points.map((point) => drawn("circle", { cx: x(point.cost), cy: at(point.loss), r: 2.6 }));
  const ring = drawn("circle", { class: "ring", cx: x(chosen.cost), cy: at(here), r: 6 });
  const said = `${metric} over ${kind}: ${plural(points.length, "recipe")} of least loss; chosen at ${number(chosen.cost)}, losing ${number(here)}`;
  const few = Object.assign((value) => y(value), { ticks: () => y.ticks(3).filter((_, i, all) => i % Math.ceil(all.length / 4) === 0) });
  return frame(height, said, x, few, drawn("path", { class: "front", d: line }), ...dots, ring);
}
