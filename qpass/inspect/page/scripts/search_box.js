// The search field: a combobox whose list goes with every key.

import { byId, element } from "./dom.js";
import { whole } from "./format.js";
import { find, indexOf } from "./search_index.js";

let entries = [];
let shown = [];
let at = -1;

/** What is searched from now on. */
export function setIndex(tree) {
  entries = indexOf(tree);
}

/** Listens to the field; `go` is called with the entry that was chosen. */
export function startSearch(go) {
  const field = byId("search");
  const list = byId("found");
  field.addEventListener("input", () => search(field.value));
  field.addEventListener("focus", () => field.value && search(field.value));
  field.addEventListener("blur", () => setTimeout(close, 150));
  field.addEventListener("keydown", (event) => {
    if (event.key === "Escape") field.value = "";
    if (event.key === "Escape") close();
    else if (event.key === "ArrowDown") choose(at + 1);
    else if (event.key === "ArrowUp") choose(at - 1);
    else if (event.key === "Enter" && shown.length) leave(shown[Math.max(at, 0)]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  list.addEventListener("pointerdown", (event) => {
    const option = event.target.closest("[role=option]");
    if (!option) return;
    event.preventDefault();
    leave(shown[Number(option.dataset.at)]);
  });
  const leave = (entry) => {
    close();
    field.blur();
    go(entry);
  };
}

function search(text) {
  const { entries: found, count } = find(entries, text);
  shown = found;
  at = -1;
  const options = found.map((entry, i) =>
    element(
      "li",
      { role: "option", id: `found-${i}`, "data-at": i, "aria-selected": "false" },
      element("span", { class: `kind ${entry.kind}`, text: entry.kind }),
      element("span", { class: "found-name", text: entry.name }),
      element("span", { class: "found-more", text: entry.more }),
    ),
  );
  if (text.trim()) {
    const rest = count > found.length ? `${whole(count)} found; the first ${found.length} are shown` : count ? `${whole(count)} found` : "Nothing has all these words in its name";
    options.push(element("li", { class: "found-count", role: "option", "aria-disabled": "true", "aria-selected": "false", text: rest }));
  }
  byId("found").replaceChildren(...options);
  byId("found").hidden = options.length === 0;
  byId("found").scrollTop = 0;
  byId("search").setAttribute("aria-expanded", String(options.length > 0));
  byId("search").removeAttribute("aria-activedescendant");
}

function choose(next) {
  if (!shown.length) return;
  at = (next + shown.length) % shown.length;
  [...byId("found").children].forEach((option, i) => option.setAttribute("aria-selected", String(i === at)));
  byId("search").setAttribute("aria-activedescendant", `found-${at}`);
  byId("found").children[at].scrollIntoView({ block: "nearest" });
}

function close() {
  byId("found").hidden = true;
  byId("search").setAttribute("aria-expanded", "false");
  byId("search").removeAttribute("aria-activedescendant");
}
