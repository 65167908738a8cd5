// The document, read from the page's script elements: the report at once, the nodes of a level when it is shown.

import { byId } from "./dom.js";

export const report = JSON.parse(byId("report").textContent);

export const siteByName = new Map(report.sites.map((site) => [site.site, site]));

const levels = new Map();

/** The nodes of a level, the same list each time. */
export function nodesOf(graph, level) {
  const key = `${graph}-${level}`;
  if (!levels.has(key)) levels.set(key, withSites(JSON.parse(byId(`nodes-${key}`).textContent)));
  return levels.get(key);
}

/** The float level does not say which node is a site; a site's name does: module:operation.count. */
function withSites(nodes) {
  if (nodes.some((node) => node.site)) return nodes;
  const places = d3.group(nodes.filter((node) => node.kind === "call"), (node) => node.module);
  for (const { site, module, operation } of report.sites) {
    const same = (places.get(module) ?? []).filter((node) => node.op.includes(operation));
    const found = same[Number(site.slice(site.lastIndexOf(".") + 1))];
    if (found) found.site ??= site;
  }
  return nodes;
}

/** The types of a site in short: i8/c0 · u8/t. */
export function typesOf(site) {
  if (!site || !site.quantized) return "float";
  return [site.weight_type, site.input_type].filter(Boolean).join(" · ") || "quantized";
}

/** Of a group of sites (a fused product has several, joined by +) those that are known. */
export function sitesOf(node) {
  if (!node.site) return [];
  const one = siteByName.get(node.site);
  return one ? [one] : node.site.split("+").map((name) => siteByName.get(name)).filter(Boolean);
}
