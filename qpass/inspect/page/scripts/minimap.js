// The whole graph in a corner, with what is seen of it; a click or drag goes there. For the mouse alone: keys have 0 and f.

import { byId } from "./dom.js";

const [MOST_WIDE, MOST_HIGH] = [110, 190];
const LEAST = 44; // a graph much higher than wide, or wider than high, is stretched to be seen
const DEPTH = 3;

/** A map of a view's root; draw() after each move or layout. */
export function createMinimap(view) {
  const canvas = byId("minimap");
  let [kx, ky] = [1, 1];
  const go = (event) => {
    if (!event.buttons) return;
    const bounds = canvas.getBoundingClientRect();
    view.camera.lookAt((event.clientX - bounds.left) / kx, (event.clientY - bounds.top) / ky);
  };
  canvas.addEventListener("pointerdown", (event) => (canvas.setPointerCapture(event.pointerId), go(event)));
  canvas.addEventListener("pointermove", go);

  return function draw() {
    const whole = view.layouts.get("m");
    const seen = view.camera.seen(0);
    const all = seen.x <= 0 && seen.y <= 0 && seen.right >= whole.width && seen.bottom >= whole.height;
    canvas.hidden = all;
    if (all) return;
    const k = Math.min(MOST_WIDE / whole.width, MOST_HIGH / whole.height);
    [kx, ky] = [Math.max(k, LEAST / whole.width), Math.max(k, LEAST / whole.height)];
    const sharp = window.devicePixelRatio || 1;
    canvas.width = whole.width * kx * sharp;
    canvas.height = whole.height * ky * sharp;
    canvas.style.setProperty("width", `${canvas.width / sharp}px`);
    canvas.style.setProperty("height", `${canvas.height / sharp}px`);
    const pen = canvas.getContext("2d");
    const colours = getComputedStyle(document.documentElement);
    pen.scale(kx * sharp, ky * sharp);
    pen.fillStyle = colours.getPropertyValue("--edge");
    pen.globalAlpha = 0.4;
    boxes(pen, view, view.tree.root, 0, 0, DEPTH);
    pen.globalAlpha = 1;
    pen.strokeStyle = colours.getPropertyValue("--accent");
    pen.setTransform(sharp, 0, 0, sharp, 0, 0);
    pen.lineWidth = 2;
    pen.strokeRect(seen.x * kx, seen.y * ky, (seen.right - seen.x) * kx, Math.max((seen.bottom - seen.y) * ky, 2));
  };
}

function boxes(pen, view, module, left, top, depth) {
  const layout = view.layouts.get(module.key);
  layout?.children.forEach((place, i) => {
    const item = module.children[i];
    pen.fillRect(left + place.x, top + place.y, place.width, place.height);
    if (depth > 1 && item.children) boxes(pen, view, item, left + place.x, top + place.y, depth - 1);
  });
}
