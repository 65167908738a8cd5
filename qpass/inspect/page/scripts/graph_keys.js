// The graph by keyboard: to the nearest box in a direction, open, close, zoom.

import { byId } from "./dom.js";
import { activate, pick, placeOf, reveal, showAll, toggle, view } from "./graph_view.js";
import { change } from "./state.js";

const STEP = 80;
const DIRECTIONS = { ArrowUp: [0, -1], ArrowDown: [0, 1], ArrowLeft: [-1, 0], ArrowRight: [1, 0] };

const ACTIONS = {
  "+": () => view.camera.zoom(1.4),
  "=": () => view.camera.zoom(1.4),
  "-": () => view.camera.zoom(1 / 1.4),
  "0": () => showAll(true, 0.02),
  f: () => view.active && reveal(view.active),
  d: () => view.active?.children && change({ chosen: { kind: "module", module: view.active } }),
  Enter: () => view.active && pick(view.active),
  " ": () => view.active && pick(view.active),
  Backspace: () => closeAround(),
};

/** Listens to the canvas and to the zoom buttons. */
export function startGraphKeys() {
  const canvas = byId("canvas");
  canvas.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || !view.tree) return;
    const direction = DIRECTIONS[event.key];
    const action = direction ? () => move(direction, event.shiftKey) : ACTIONS[event.key];
    if (!action) return;
    event.preventDefault();
    action();
  });
  canvas.addEventListener("pointerdown", () => canvas.focus({ preventScroll: true }));
  byId("zoom-in").addEventListener("click", ACTIONS["+"]);
  byId("zoom-out").addEventListener("click", ACTIONS["-"]);
  byId("fit").addEventListener("click", ACTIONS["0"]);
}

function move([dx, dy], panning) {
  if (panning) {
    view.camera.pan(-dx * STEP, -dy * STEP);
    return;
  }
  const boxes = [...view.shown.values()].filter((each) => !each.open);
  const from = view.active && placeOf(view.active);
  const next = from ? nearestBox(boxes, view.active, from, dx, dy) : topmost(boxes);
  if (!next) return;
  activate(next.item);
  view.camera.intoSight(placeOf(next.item));
}

function topmost(boxes) {
  return boxes.reduce((a, b) => (!a || b.y < a.y ? b : a), null);
}

function nearestBox(boxes, own, from, dx, dy) {
  const middle = (box) => [box.x + box.width / 2, box.y + box.height / 2];
  const [x, y] = middle(from);
  let [best, least] = [null, Infinity];
  for (const box of boxes) {
    const [bx, by] = middle(box);
    const ahead = dx * (bx - x) + dy * (by - y);
    const aside = Math.abs(dx * (by - y)) + Math.abs(dy * (bx - x));
    if (box.item === own || ahead <= 1 || (dx && aside > 2 * ahead + 30)) continue;
    const cost = ahead + 1.5 * aside;
    if (cost < least) [best, least] = [box, cost];
  }
  return best;
}

function closeAround() {
  const item = view.active;
  if (!item) return;
  if (item.children && view.open.has(item.key)) toggle(item);
  else if (item.parent?.parent) toggle(item.parent).then(() => placeOf(item.parent) && view.camera.intoSight(placeOf(item.parent)));
}
