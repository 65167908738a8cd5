// The table of sites: a click on a heading sorts, words filter, a row opens its details.

import { report, siteByName } from "./data.js";
import { byId, element } from "./dom.js";
import { bytes, count, DASH, number, percent, plural, shape } from "./format.js";
import { createRows } from "./rows.js";
import { change, state } from "./state.js";

const COLUMNS = [
  { name: "Site", of: (s) => s.site, text: (v) => v, kind: "name" },
  { name: "Type", of: (s) => (s.quantized ? [s.weight_type, s.input_type].filter(Boolean).join(" · ") : "float"), text: (v) => v || DASH },
  { name: "Shape", of: (s) => s.parameters, text: (v, s) => shape(s.shape), more: "Sorted by parameters" },
  { name: "SQNR dB", of: (s) => s.sqnr, text: (v) => number(v), more: "Signal to quantization noise of the output, in dB: higher is better" },
  { name: "Cosine", of: (s) => s.cosine, text: (v) => number(v, 5), more: "Between its float and its quantized output" },
  { name: "Loss alone", of: (s) => s.loss_alone, text: (v) => number(v), more: "At the model's output, with this site alone quantized" },
  { name: "Loss without", of: (s) => s.loss_without, text: (v) => number(v), more: "At the model's output, with all sites but this one quantized" },
  { name: "Clipped", of: (s) => s.clipped, text: (v) => percent(v, 2), more: "Share of the input's values outside the grid" },
  { name: "Multiply-adds", of: (s) => s.multiply_adds, text: (v) => count(v) },
  { name: "Bytes", of: (s) => s.bytes, text: (v) => bytes(v) },
  { name: "Time ms", of: (s) => s.milliseconds, text: (v) => number(v) },
  { name: "Roofline", of: (s) => s.roofline, text: (v) => percent(v, 0), more: "Share of what the machine could do" },
];
const TEXTS = 2; // the first columns are words, the others figures

const sorting = { column: -1, down: false };
let siteRows = null;

/** Makes the table; done once. */
export function startTable() {
  const heads = COLUMNS.map((column, i) =>
    element(
      "th",
      { scope: "col", class: i >= TEXTS ? "figure" : column.kind, title: column.more },
      element("button", { type: "button", text: column.name, on: { click: () => sortBy(i) } }),
    ),
  );
  const body = element("tbody");
  const table = element("table", { class: "sites", "aria-label": "Sites" }, element("thead", {}, element("tr", { "aria-rowindex": 1 }, ...heads)), body);
  byId("view-sites").append(table);
  siteRows = createRows({
    scroller: byId("view-sites"),
    body,
    height: 30,
    make: rowOf,
    open: (site) => change({ chosen: { kind: "site", site } }),
  });
  byId("filter").addEventListener("input", showSites);
  showSites();
}

function rowOf(site) {
  const cells = COLUMNS.map((column, i) => {
    const text = column.text(column.of(site), site);
    const tag = i === 0 ? "th" : "td";
    return element(tag, { class: i >= TEXTS ? "figure" : column.kind, scope: i === 0 ? "row" : null, title: i === 0 ? text : null, text });
  });
  const chosen = state.chosen?.kind === "site" && state.chosen.site === site;
  return element("tr", { class: site.quantized ? "" : "float", "aria-current": chosen ? "true" : null }, ...cells);
}

function sortBy(column) {
  const figures = column >= TEXTS;
  sorting.down = sorting.column === column ? !sorting.down : figures && COLUMNS[column].name !== "SQNR dB" && COLUMNS[column].name !== "Cosine";
  sorting.column = column;
  showSites();
}

/** Filters, sorts and draws. What was not measured comes last, whichever way the others are sorted. */
export function showSites() {
  const words = byId("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
  const text = (s) => [s.site, s.operation, s.weight_type, s.input_type, s.quantized ? "" : "float", s.why_float, s.note].join(" ").toLowerCase();
  let found = words.length ? report.sites.filter((site) => words.every((word) => text(site).includes(word))) : report.sites;
  if (sorting.column >= 0) found = sorted(found, COLUMNS[sorting.column].of, sorting.down);
  byId("view-sites").querySelectorAll("thead th").forEach((head, i) => {
    if (i === sorting.column) head.setAttribute("aria-sort", sorting.down ? "descending" : "ascending");
    else head.removeAttribute("aria-sort");
  });
  byId("view-sites").querySelector("table").setAttribute("aria-rowcount", found.length + 1);
  byId("shown").textContent = found.length === siteByName.size ? plural(found.length, "site") : `${found.length} of ${plural(siteByName.size, "site")}`;
  siteRows.show(found);
}

function sorted(sites, of, down) {
  const none = (value) => value === null || value === undefined;
  const order = (a, b) => {
    const [x, y] = [of(a), of(b)];
    if (none(x) || none(y)) return none(x) - none(y);
    const way = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
    return down ? -way : way;
  };
  return [...sites].sort(order);
}

/** Draws the rows again: which one is chosen is another now. */
export function markSites() {
  siteRows.draw();
}
