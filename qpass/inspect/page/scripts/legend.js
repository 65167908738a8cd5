// What the colours mean.

import { extent, figureAt, typeColour } from "./colours.js";
import { report } from "./data.js";
import { byId, element } from "./dom.js";
import { plural, unit } from "./format.js";
import { state } from "./state.js";
import { MODES, typeCounts } from "./values.js";

/** Draws the legend of the colours that are shown. */
export function showLegend() {
  const { name } = MODES[state.colour];
  const body = state.colour === "type" ? typeRows() : scaleRows(state.colour);
  byId("legend").replaceChildren(element("p", { class: "legend-name", text: name }), ...body);
}

function typeRows() {
  const rows = typeCounts(report.sites).map(([text, n]) =>
    element(
      "li",
      {},
      element("span", { class: text === "float" ? "swatch float" : "swatch", style: { background: typeColour(text) } }),
      element("span", { text: text === "float" ? "left in float" : text }),
      element("span", { class: "muted", text: plural(n, "site") }),
    ),
  );
  rows.push(element("li", {}, element("span", { class: "swatch plain" }), element("span", { text: "no site" })));
  return [element("ul", {}, ...rows)];
}

function scaleRows(mode) {
  const found = extent(mode);
  if (!found) return [element("p", { class: "muted", text: "Not measured in this report." })];
  const stops = d3.range(0, 1.01, 0.1).map((share) => d3.interpolateCividis(share));
  const label = (share, word) => `${unit(figureAt(mode, share), MODES[mode].unit)} ${word}`.trim();
  const [left, right] = [label(0, MODES[mode].good), label(1, MODES[mode].bad)];
  return [
    element("div", { class: "ramp", style: { background: `linear-gradient(90deg, ${stops.join(", ")})` } }),
    element("div", { class: "ends" }, element("span", { text: left }), element("span", { text: right })),
    element("p", { class: "muted", text: mode === "time" ? "a module: the sum of its sites" : "a module: its worst site" }),
  ];
}
