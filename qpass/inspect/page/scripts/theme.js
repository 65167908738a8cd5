// Light and dark: as the system says, until someone chooses.

import { byId } from "./dom.js";

const system = matchMedia("(prefers-color-scheme: dark)");
let chosen = null;

/** Whether the page is dark now. */
export function isDark() {
  return chosen === null ? system.matches : chosen === "dark";
}

/** Calls `changed` whenever the page becomes light or dark. */
export function startTheme(changed) {
  const show = () => {
    document.documentElement.dataset.theme = isDark() ? "dark" : "light";
    byId("theme").textContent = isDark() ? "Light" : "Dark";
    byId("theme").setAttribute("aria-label", isDark() ? "Light page" : "Dark page");
    changed();
  };
  system.addEventListener("change", show);
  byId("theme").addEventListener("click", () => {
    chosen = isDark() ? "light" : "dark";
    show();
  });
  show();
}
