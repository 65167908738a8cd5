// All that the report knows of one site.

import { channels, codesOf, gridNote, histogram, scatter } from "./charts.js";
import { report, siteByName, typesOf } from "./data.js";
import { element } from "./dom.js";
import { bytes, count, DASH, number, percent, ratio, shape, unit, whole } from "./format.js";
import { change } from "./state.js";

/** A titled part of the details, or null without content. */
export function part(title, ...content) {
  const shown = content.flat().filter(Boolean);
  return shown.length ? element("section", {}, element("h3", { text: title }), ...shown) : null;
}

/** Terms and their figures. */
export function terms(pairs) {
  return element("dl", { class: "terms" }, ...pairs.flatMap(([name, text, more]) => [element("dt", { text: name, title: more }), element("dd", { text: text || DASH })]));
}

/** A button that chooses a site. */
export function siteLink(name, more) {
  const site = siteByName.get(name);
  const label = more ? `${name}  ${more}` : name;
  return site ? element("button", { type: "button", class: "link", text: label, on: { click: () => change({ chosen: { kind: "site", site } }) } }) : element("span", { text: label });
}

/** The parts of a site's details. */
export function siteParts(site) {
  return [
    ...(site.why_float ? [element("p", { class: "callout why", text: `Left in float: ${site.why_float}` })] : []),
    ...(site.note ? [element("p", { class: "callout", text: site.note })] : []),
    part("Error", errorTerms(site)),
    part("Input", inputChart(site), inputTerms(site)),
    part("Weight", weightCharts(site), costTerms(site)),
    part("Output, float against quantized", site.scatter && scatter(site.scatter), site.scatter && element("p", { class: "caption", text: "Across: float. Up: quantized. On the dashed line nothing was lost." })),
    part("Source", source(site.source)),
    part("Rules", rules(site)),
  ];
}

function errorTerms(site) {
  const metric = report.summary.metric;
  const loss = (name) => (metric ? `${name} (${metric})` : name);
  return terms([
    ["SQNR", unit(site.sqnr, "dB"), "Signal to quantization noise of the site's output"],
    ["Cosine", number(site.cosine, 6)],
    ["Largest error", number(site.worst)],
    [loss("Loss alone"), number(site.loss_alone), "At the model's output, with this site alone quantized"],
    [loss("Loss without"), number(site.loss_without), "At the model's output, with all sites but this one quantized"],
  ]);
}

/** The values that the integers of a static input stand for, or null. */
export function inputGrid(site) {
  const codes = codesOf(site.input_type);
  if (!codes || !site.scale) return null;
  const zero = site.zero_point ?? 0;
  return { low: (codes[0] - zero) * site.scale, high: (codes[1] - zero) * site.scale, step: site.scale };
}

function inputChart(site) {
  if (!site.input_histogram) return [];
  const grid = inputGrid(site);
  const words = grid ? gridNote(site.input_histogram, grid) : site.input_type ? "Its scale is chosen at run time, from the values themselves: no one grid can be drawn." : "It stays float: no grid.";
  return [histogram(site.input_histogram, grid, "Input"), element("p", { class: "caption", text: words })];
}

function inputTerms(site) {
  const range = site.range ? `${number(site.range[0], 4)} .. ${number(site.range[1], 4)}` : DASH;
  const list = [
    ["Type", site.input_type ?? "float"],
    ["Range", range, "Seen in calibration"],
    ["Scale", number(site.scale, 5)],
    ["Zero point", whole(site.zero_point)],
    ["Clipped", percent(site.clipped, 3), "Share of values outside the grid"],
  ];
  const shared = site.group && site.group !== site.site ? element("p", { class: "caption" }, "Shares its scale with ", siteLink(site.group)) : null;
  return [terms(list), shared];
}

function weightCharts(site) {
  const found = [];
  if (site.weight_channels && site.weight_channels.lo.length) {
    const { lo, of } = site.weight_channels;
    const some = of && of > lo.length ? `${lo.length} of ${whole(of)} channels, evenly picked` : `${lo.length} channels`;
    found.push(channels(site.weight_channels, site.weight_type), element("p", { class: "caption", text: `Least and largest weight of each channel (${some}); behind it, what its integers reach.` }));
  }
  if (site.weight_histogram) found.push(histogram(site.weight_histogram, null, "Weights"));
  return found;
}

function costTerms(site) {
  return terms([
    ["Type", site.weight_type ?? "float"],
    ["Shape", shape(site.shape)],
    ["Parameters", count(site.parameters)],
    ["Bytes", `${bytes(site.bytes)} of ${bytes(site.bytes_float)}${inBrackets(ratio(site.bytes, site.bytes_float))}`],
    ["Multiply-adds", count(site.multiply_adds)],
    ["Time", unit(site.milliseconds, "ms")],
    ["Roofline", percent(site.roofline), "Share of what the machine could do at best"],
  ]);
}

function inBrackets(share) {
  return share === null ? "" : ` (${percent(share)})`;
}

function source(found) {
  if (!found) return [];
  const place = found.line ? `${found.file}:${found.line}` : found.file;
  return [element("p", { class: "caption code", text: place }), found.code ? element("pre", { tabindex: 0, text: found.code }) : null];
}

function rules(site) {
  const items = [
    ...site.rules.map((text) => ["hit", "✓", text]),
    ...site.missed.map(({ rule, why }) => ["miss", "✗", `${rule}: ${why}`]),
    ...site.kept.map((text) => ["kept", "!", `left to the reference: ${text}`]),
  ];
  const words = { hit: "applied", miss: "missed", kept: "kept" };
  if (!items.length) return [];
  return [element("ul", { class: "rules" }, ...items.map(([kind, sign, text]) =>
    element("li", { class: kind }, element("span", { "aria-hidden": "true", text: sign }), element("span", { class: "hidden", text: words[kind] }), element("span", { text })))) ];
}

/** The heading's second line. */
export function siteLine(site) {
  return `${site.operation}, ${typesOf(site)}`;
}
