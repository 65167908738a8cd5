// Puts the parts together: who listens to what.

import { levelName, nextChange, offerLevels, showCompare, startCompare } from "./compare_view.js";
import { report } from "./data.js";
import { byId, element } from "./dom.js";
import { startGraphKeys } from "./graph_keys.js";
import { openDepth, repaint, reveal, showLevel, startGraph, view } from "./graph_view.js";
import { showLegend } from "./legend.js";
import { closeDetails, leafOfSite, showDetails } from "./node_details.js";
import { setIndex, startSearch } from "./search_box.js";
import { markSites, startTable } from "./site_table.js";
import { change, state, watch } from "./state.js";
import { showSummary } from "./summary.js";
import { showView, startTabs, VIEWS } from "./tabs.js";
import { startTheme } from "./theme.js";
import { MODES } from "./values.js";

function choices(identity, options, name) {
  const select = byId(identity);
  select.replaceChildren(...options.map(([value, text]) => element("option", { value, text, selected: String(value) === String(state[name]) })));
}

function startChoices() {
  choices("graph", report.graphs.map((graph, i) => [i, graph.name]), "graph");
  byId("graph-label").hidden = report.graphs.length < 2;
  byId("graph-label").dataset.view = report.graphs.length < 2 ? "never" : "graph compare";
  choices("colour", Object.entries(MODES).map(([mode, { name }]) => [mode, name]), "colour");
  const listen = (identity, parts) => byId(identity).addEventListener("change", (event) => change(parts(event.target)));
  listen("graph", (select) => ({ graph: Number(select.value), level: lastLevel(Number(select.value)), chosen: null }));
  listen("level", (select) => ({ level: Number(select.value) }));
  listen("colour", (select) => ({ colour: select.value }));
  listen("parameters", (box) => ({ parameters: box.checked }));
  for (const [identity, how] of [["collapse", "none"], ["deeper", "next"], ["expand", "all"]]) {
    byId(identity).addEventListener("click", () => view.tree && openDepth(how));
  }
}

function lastLevel(graph) {
  return Math.max(0, (report.graphs[graph]?.levels.length ?? 0) - 1);
}

function offerShownLevels() {
  choices("level", (report.graphs[state.graph]?.levels ?? []).map((level, i) => [i, levelName(level)]), "level");
}

async function load(keep) {
  const shown = showLevel(keep); // the tree is there at once, the layout later
  setIndex(view.tree);
  await shown;
}

async function goTo(entry) {
  if (entry.kind === "site") {
    const leaf = leafOfSite(entry.site);
    change({ chosen: { kind: "site", site: entry.site } });
    if (leaf && state.view === "graph") await reveal(leaf);
    return;
  }
  change({ view: "graph", chosen: entry.leaf ? { kind: "node", leaf: entry.leaf } : state.chosen });
  await reveal(entry.leaf ?? entry.module);
  byId("canvas").focus({ preventScroll: true });
}

function startKeys() {
  const help = () => byId("keys").showModal();
  byId("help").addEventListener("click", help);
  byId("licence-text").textContent = byId("licences").textContent;
  const actions = {
    "/": () => byId("search").focus(),
    "?": help,
    t: () => byId("theme").click(),
    n: () => state.view === "compare" && nextChange(1),
    p: () => state.view === "compare" && nextChange(-1),
    Escape: closeDetails,
    ...Object.fromEntries(VIEWS.map((name, i) => [String(i + 1), () => change({ view: name })])),
  };
  document.addEventListener("keydown", (event) => {
    const typing = event.target.closest("input:not([type=checkbox]), select, textarea, dialog");
    if (typing || event.ctrlKey || event.metaKey || event.altKey || !actions[event.key]) return;
    event.preventDefault();
    actions[event.key]();
  });
}

function start() {
  showSummary();
  startTheme(() => view.tree && repaint());
  state.level = lastLevel(0);
  startTabs();
  startChoices();
  offerShownLevels();
  startGraph();
  startGraphKeys();
  startSearch(goTo);
  startTable();
  startCompare();
  startKeys();
  offerLevels();
  watch("view", showView);
  watch("view graph", () => state.view === "compare" && showCompare());
  watch("graph", () => (offerShownLevels(), offerLevels()));
  watch("graph level parameters", () => load(true));
  watch("colour", () => (showLegend(), repaint()));
  watch("chosen", () => (showDetails(), markSites()));
  showView();
  showLegend();
  requestAnimationFrame(() => setTimeout(() => load(false))); // the summary is seen first
}

start();
