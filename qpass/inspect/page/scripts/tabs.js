// Three views of one report, and the choices that each has.

import { byId } from "./dom.js";
import { change, state } from "./state.js";

export const VIEWS = ["graph", "sites", "compare"];

/** Listens to the tabs: a click, or arrow keys as in any list of tabs. */
export function startTabs() {
  VIEWS.forEach((view) => byId(`tab-${view}`).addEventListener("click", () => change({ view })));
  byId("tabs").addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step ? VIEWS.at((VIEWS.indexOf(state.view) + step) % VIEWS.length) : { Home: VIEWS[0], End: VIEWS.at(-1) }[event.key];
    if (!next) return;
    event.preventDefault();
    change({ view: next });
    byId(`tab-${next}`).focus();
  });
}

/** Shows the view that is chosen, and hides the others. */
export function showView() {
  for (const view of VIEWS) {
    const own = view === state.view;
    byId(`view-${view}`).hidden = !own;
    byId(`tab-${view}`).setAttribute("aria-selected", String(own));
    byId(`tab-${view}`).tabIndex = own ? 0 : -1;
  }
  for (const control of byId("controls").children) control.hidden = !control.dataset.view.split(" ").includes(state.view);
}
