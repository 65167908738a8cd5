// Before and after: two levels' lines beside each other, each site's beside its own.

import { align } from "./align.js";
import { nodesOf, report, sitesOf, typesOf } from "./data.js";
import { byId, element } from "./dom.js";
import { plural } from "./format.js";
import { createRows } from "./rows.js";
import { change, state } from "./state.js";

const MARKS = { same: [" ", "the same"], changed: ["~", "changed"], removed: ["−", "removed"], added: ["+", "added"] };

const comparison = { key: "", rows: [], shown: [], list: null };

/** Makes the table and its choices; done once. */
export function startCompare() {
  const head = (text) => element("th", { scope: "col", text });
  const names = [["before-head", "Before"], ["after-head", "After"]].map(([id, text]) => element("th", { scope: "col", id, text }));
  const body = element("tbody");
  const table = element("table", { class: "compare", "aria-label": "Before and after" },
    element("thead", {}, element("tr", {}, element("th", { scope: "col", class: "mark" }, element("span", { class: "hidden", text: "Change" })), ...names, head("Site or module"))), body);
  byId("view-compare").append(table);
  comparison.list = createRows({ scroller: byId("view-compare"), body, height: 26, make: lineOf, open: openLine });
  for (const id of ["before", "after"]) byId(id).addEventListener("change", showCompare);
  byId("changes").addEventListener("change", showCompare);
  byId("next-change").addEventListener("click", () => nextChange(1));
  byId("previous-change").addEventListener("click", () => nextChange(-1));
}

/** Offers the levels of the chosen graph: the first against the last. */
export function offerLevels() {
  const levels = report.graphs[state.graph]?.levels ?? [];
  [["before", 0], ["after", levels.length - 1]].forEach(([id, chosen]) => {
    byId(id).replaceChildren(...levels.map((level, i) => element("option", { value: i, text: levelName(level), selected: i === chosen })));
  });
  comparison.key = "";
}

/** A level in a list. */
export function levelName(level) {
  return level.after && level.after !== level.level ? `${level.level} (after ${level.after})` : level.level;
}

/** Aligns the two chosen levels and shows them. */
export function showCompare() {
  const { levels } = report.graphs[state.graph] ?? { levels: [] };
  if (!levels.length) {
    comparison.list.show([]);
    byId("counted").textContent = "No graph was captured";
    return;
  }
  const [left, right] = ["before", "after"].map((id) => Number(byId(id).value));
  const key = `${state.graph}-${left}-${right}`;
  if (comparison.key !== key) {
    comparison.rows = align(nodesOf(state.graph, left), nodesOf(state.graph, right));
    comparison.key = key;
  }
  byId("before-head").textContent = levelName(levels[left]);
  byId("after-head").textContent = levelName(levels[right]);
  comparison.shown = byId("changes").checked ? comparison.rows.filter((row) => row.mark !== "same") : comparison.rows;
  const counts = d3.rollup(comparison.rows, (rows) => rows.length, (row) => row.mark);
  byId("counted").textContent = ["changed", "added", "removed"].map((mark) => `${(counts.get(mark) ?? 0).toLocaleString("en-US")} ${mark}`).join(", ");
  byId("view-compare").querySelector("table").setAttribute("aria-rowcount", comparison.shown.length + 1);
  byId("counted").title = plural(comparison.rows.length, "line");
  comparison.list.show(comparison.shown);
}

function lineOf({ left, right, mark }) {
  const node = right ?? left;
  const [sign, word] = MARKS[mark];
  const text = (each) => element("td", { class: "code", title: each?.text }, element("span", { text: each ? each.text : "" }));
  const sites = sitesOf(node);
  const place = node.site ?? node.module;
  return element(
    "tr",
    { class: mark },
    element("td", { class: "mark" }, element("span", { "aria-hidden": "true", text: sign }), element("span", { class: "hidden", text: word })),
    text(left),
    text(right),
    element("td", { class: node.site ? "place site" : "place", title: place }, element("span", { text: place }),
      sites.length ? element("span", { class: "chip", text: typesOf(sites[0]) }) : null),
  );
}

function openLine({ left, right }) {
  const node = right ?? left;
  const [site] = sitesOf(node);
  change({ chosen: site ? { kind: "site", site } : { kind: "line", node, level: Number(byId(right ? "after" : "before").value) } });
}

/** Goes to the next line that changed, down (1) or up (-1). */
export function nextChange(way) {
  const { shown, list } = comparison;
  for (let i = list.at + way; i >= 0 && i < shown.length; i += way) {
    const begins = shown[i].mark !== "same" && shown[i - 1]?.mark !== shown[i].mark;
    if (begins) {
      list.goTo(i);
      return;
    }
  }
}
