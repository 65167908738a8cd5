// A long list of rows of one height, of which only those in sight have elements; a row is chosen by keys as by mouse.

import { oncePerFrame } from "./dom.js";

const MORE = 8;

/**
 * Rows in `body`, the rowgroup of a table that `scroller` scrolls. make(row, i): the element of a row; open(row, i): Enter
 * or a click on it; height: of a row in pixels.
 */
export function createRows({ scroller, body, height, make, open }) {
  let rows = [];
  let at = 0;
  let keep = false;
  const spacers = [0, 1].map(() => {
    const cell = document.createElement("td");
    const row = document.createElement("tr");
    row.setAttribute("aria-hidden", "true");
    row.className = "spacer";
    row.append(cell);
    return row;
  });

  const visible = () => {
    const top = Math.max(0, Math.floor(scroller.scrollTop / height) - MORE);
    return [top, Math.min(rows.length, top + Math.ceil(scroller.clientHeight / height) + 2 * MORE)];
  };
  const draw = () => {
    const [from, to] = visible();
    keep = keep || body.contains(document.activeElement);
    const shown = rows.slice(from, to).map((row, i) => {
      const made = make(row, from + i);
      made.dataset.at = from + i;
      made.setAttribute("aria-rowindex", from + i + 2);
      made.tabIndex = from + i === at ? 0 : -1;
      return made;
    });
    if (shown.length && (at < from || at >= to)) shown[0].tabIndex = 0;
    spacers[0].style.height = `${from * height}px`;
    spacers[1].style.height = `${(rows.length - to) * height}px`;
    body.replaceChildren(spacers[0], ...shown, spacers[1]);
    if (keep && at >= from && at < to) {
      shown[at - from].focus({ preventScroll: true });
      keep = false;
    }
  };
  const goTo = (next, focus = true) => {
    if (!rows.length) return;
    at = Math.max(0, Math.min(rows.length - 1, next));
    const head = scroller.querySelector("thead")?.offsetHeight ?? 0;
    const [top, bottom] = [at * height, (at + 1) * height];
    const room = scroller.clientHeight - head;
    if (top < scroller.scrollTop) scroller.scrollTop = top;
    else if (bottom > scroller.scrollTop + room) scroller.scrollTop = focus ? bottom - room : top - room / 3;
    keep = focus;
    draw();
  };

  scroller.addEventListener("scroll", oncePerFrame(draw));
  new ResizeObserver(oncePerFrame(draw)).observe(scroller);
  body.addEventListener("focusin", (event) => {
    const row = event.target.closest("tr[data-at]");
    if (row) at = Number(row.dataset.at);
  });
  body.addEventListener("click", (event) => {
    const row = event.target.closest("tr[data-at]");
    if (!row) return;
    at = Number(row.dataset.at);
    open(rows[at], at);
  });
  body.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(scroller.clientHeight / height) - 2);
    const to = { ArrowDown: at + 1, ArrowUp: at - 1, PageDown: at + page, PageUp: at - page, Home: 0, End: rows.length - 1 }[event.key];
    if (to !== undefined) goTo(to);
    else if (event.key === "Enter" || event.key === " ") open(rows[at], at);
    else return;
    event.preventDefault();
  });
  return {
    show(next) {
      rows = next;
      at = 0;
      scroller.scrollTop = 0;
      draw();
    },
    draw,
    goTo,
    get at() {
      return at;
    },
  };
}
