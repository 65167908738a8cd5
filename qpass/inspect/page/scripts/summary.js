// What the whole came to: coverage, size, loss, time.

import { frontChart } from "./charts.js";
import { report } from "./data.js";
import { byId, element } from "./dom.js";
import { bytes, count, DASH, number, percent, plural, ratio, unit } from "./format.js";

/** Fills the top of the page; done once. */
export function showSummary() {
  const { summary } = report;
  byId("model").textContent = summary.model ?? "Report";
  const chips = [summary.scheme, summary.backend && `on ${summary.backend}`, summary.qpass && `qpass ${summary.qpass}`, summary.torch && `torch ${summary.torch}`];
  byId("origin").append(...chips.filter(Boolean).map((text) => element("span", { class: "chip", text })));
  byId("summary").append(element("div", { class: "cards" }, ...cards(summary)));
  const { notes } = summary;
  if (notes.length) byId("summary").append(element("ul", { class: "notes", tabindex: notes.length > 3 ? 0 : null }, ...notes.map((text) => element("li", { text }))));
  if (report.front) byId("summary").append(frontOf(report.front));
}

function frontOf(front) {
  const { chosen, metric, unit: kind } = front;
  const found = chosen.loss === null ? "not measured" : `${number(chosen.loss)} measured`;
  const note = `The least ${metric} at each cost in ${kind}, as predicted; the ring is this recipe: ${number(chosen.predicted)} predicted, ${found}.`;
  return element("details", { class: "front" }, element("summary", { text: `Front: ${metric} over ${kind}` }), frontChart(front), element("p", { class: "card-more", text: note }));
}

function cards(summary) {
  const { parameters, multiply_adds: macs, bytes: size, sites, milliseconds: time, metric, loss } = summary;
  const smaller = ratio(size?.float, size?.quantized);
  const faster = ratio(time?.float, time?.quantized);
  const share = (pair) => ratio(pair?.quantized, pair?.all);
  return [
    card("Parameters quantized", percent(share(parameters)), `${count(parameters?.quantized)} of ${count(parameters?.all)}`, share(parameters)),
    card("Multiply-adds quantized", percent(share(macs)), macs ? `${count(macs.quantized)} of ${count(macs.all)}` : "not counted", share(macs)),
    card("Size", bytes(size?.quantized), `${smaller === null ? DASH : `${smaller.toFixed(2)} × smaller`} than ${bytes(size?.float)}`, ratio(size?.quantized, size?.float)),
    card(metric ? `Loss (${metric})` : "Loss", number(loss), metric ? `at the output, ${plural(summary.batches, "batch").replace("batchs", "batches")}` : "not measured"),
    card("Latency", unit(time?.quantized, "ms"), time ? `${faster === null ? DASH : `${faster.toFixed(2)} ×`} as fast as ${unit(time.float, "ms")}` : "not measured", ratio(time?.quantized, time?.float)),
    card("Sites", String(sites.quantized), `quantized, ${sites.float} left in float`, ratio(sites.quantized, sites.quantized + sites.float)),
  ];
}

function card(name, value, more, share = null) {
  const bar = share === null ? null : element("span", { class: "meter", "aria-hidden": "true" }, element("span", { style: { width: percent(Math.min(share, 1)) } }));
  return element("div", { class: "card" }, element("p", { class: "card-name", text: name }), element("p", { class: "card-value", text: value }), bar, element("p", { class: "card-more", text: more }));
}
