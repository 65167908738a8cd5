// The panel at the side: a site, a node or a module that was chosen.

import { nodesOf, siteByName, sitesOf } from "./data.js";
import { byId, element } from "./dom.js";
import { readers } from "./edges.js";
import { number, plural, shape, unit } from "./format.js";
import { reveal, view } from "./graph_view.js";
import { part, siteLine, siteLink, siteParts, terms } from "./site_details.js";
import { change, state } from "./state.js";
import { typeCounts } from "./values.js";

const MOST = 40; // of nodes or sites that a list names

/** Shows what is chosen, or nothing. */
export function showDetails() {
  const panel = byId("details");
  const { chosen } = state;
  panel.hidden = !chosen;
  document.body.classList.toggle("with-details", Boolean(chosen));
  if (!chosen) return;
  const [kind, title, line, parts] = contents(chosen);
  const close = element("button", { type: "button", class: "close", "aria-label": "Close the details", text: "×", on: { click: closeDetails } });
  const head = element("header", {}, element("p", { class: "kind", text: kind }), close, element("h2", { id: "details-title", tabindex: -1 }, ...title.split(/(?<=[.:])/).flatMap((word) => [word, element("wbr")])), line ? element("p", { class: "muted", text: line }) : null);
  panel.replaceChildren(head, ...parts.filter(Boolean));
  panel.scrollTop = 0;
}

/** Closes the panel; the keys go back to where they were. */
export function closeDetails() {
  const inside = byId("details").contains(document.activeElement);
  change({ chosen: null });
  if (!inside) return;
  const view_ = { graph: "#canvas", sites: "#view-sites tr[tabindex='0']", compare: "#view-compare tr[tabindex='0']" }[state.view];
  document.querySelector(view_)?.focus();
}

function contents(chosen) {
  if (chosen.kind === "site") return siteContents(chosen.site, null);
  if (chosen.kind === "module") return moduleContents(chosen.module);
  const node = chosen.leaf?.node ?? chosen.node;
  const [site] = sitesOf(node);
  return site ? siteContents(site, node) : ["operation", node.op, node.module, nodeParts(node, nodesOf(state.graph, chosen.level ?? state.level))];
}

function siteContents(site, node) {
  const nodes = view.tree ? view.tree.nodes.filter((each) => sitesOf(each).includes(site)) : [];
  const show = nodes.length && state.view !== "graph" ? element("button", { type: "button", class: "wide", text: "Show in the graph", on: { click: () => showNode(nodes.at(-1).id) } }) : null;
  const fused = node && sitesOf(node).length > 1 ? part("Fused with", sitesOf(node).slice(1).map((each) => siteLink(each.site))) : null;
  const own = node ? part("This operation", nodeTerms(node)) : null;
  const lines = nodes.length ? part("In this level", lineList(nodes)) : null;
  return ["site", site.site, siteLine(site), [show, ...siteParts(site), fused, own, lines]];
}

function nodeTerms(node) {
  return [
    element("pre", { tabindex: 0, text: node.text }),
    terms([
      ["Module", node.module],
      ["Values", `${node.dtype ?? "–"}  ${shape(node.shape)}`],
      ["Made by rule", node.rule],
    ]),
  ];
}

function nodeParts(node, nodes) {
  const byNumber = new Map(nodes.map((each) => [each.id, each]));
  const used = node.inputs.map((id) => byNumber.get(id)).filter(Boolean);
  const readBy = (readers(nodes).get(node.id) ?? []).map((id) => byNumber.get(id));
  return [part("This operation", nodeTerms(node)), part("Reads", lineList(used)), part("Read by", lineList(readBy))];
}

function lineList(nodes) {
  if (!nodes.length) return [];
  const items = nodes.slice(0, MOST).map((node) => {
    const known = view.tree?.leaves.get(node.id)?.node === node;
    const line = known
      ? element("button", { type: "button", class: "link code", text: node.text, on: { click: () => showNode(node.id) } })
      : element("span", { class: "code", text: node.text });
    return element("li", {}, line);
  });
  const more = nodes.length > MOST ? element("li", { class: "muted", text: `and ${nodes.length - MOST} more` }) : null;
  return [element("ul", { class: "lines" }, ...items, more)];
}

async function showNode(id) {
  const leaf = view.tree.leaves.get(id);
  if (!leaf) return;
  change({ view: "graph", chosen: { kind: "node", leaf } });
  await reveal(leaf);
}

function moduleContents(module) {
  const worst = module.sites.filter((site) => site.sqnr !== null).sort((a, b) => a.sqnr - b.sqnr);
  const time = module.sites.reduce((sum, site) => (site.milliseconds === null ? sum : (sum ?? 0) + site.milliseconds), null);
  const counted = typeCounts(module.sites).map(([type, n]) => [type, plural(n, "site")]);
  return [
    "module",
    module.path || module.name || "model",
    `${plural(module.operations, "operation")}, ${plural(module.sites.length, "site")}`,
    [
      part("Types", counted.length ? terms(counted) : null),
      part("Cost", terms([["Time of its sites", unit(time, "ms")]])),
      part("Sites by error", worst.slice(0, MOST).map((site) => siteLink(site.site, `${number(site.sqnr)} dB`))),
      part("Left in float", module.sites.filter((site) => !site.quantized).slice(0, MOST).map((site) => siteLink(site.site))),
    ],
  ];
}

/** The node of the shown level that a site is best seen at, or undefined. */
export function leafOfSite(site) {
  return view.tree?.nodes.filter((node) => siteByName.size && sitesOf(node).includes(site)).map((node) => view.tree.leaves.get(node.id)).filter(Boolean).at(-1);
}
