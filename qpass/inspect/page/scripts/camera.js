// What part of the graph is seen: pan and zoom by d3, fit, and moving to a place.

import { oncePerFrame } from "./dom.js";

const NEAREST = 3;
const FARTHEST = 0.02;
const calm = matchMedia("(prefers-reduced-motion: reduce)");

/** A camera on an SVG element, whose `world` group it moves; `moved` is called at most once a frame. */
export function createCamera(svg, world, moved) {
  const later = oncePerFrame(moved);
  let at = d3.zoomIdentity;
  const zoom = d3
    .zoom()
    .scaleExtent([FARTHEST, NEAREST])
    .on("zoom", (event) => {
      at = event.transform;
      world.setAttribute("transform", at.toString());
      later();
    });
  const selection = d3.select(svg).call(zoom).on("dblclick.zoom", null);

  const size = () => [svg.clientWidth || 1, svg.clientHeight || 1];
  const go = (transform, animated) => {
    selection.interrupt();
    (animated && !calm.matches ? selection.transition().duration(220) : selection).call(zoom.transform, transform);
  };
  const centred = (x, y, k) => {
    const [width, height] = size();
    return d3.zoomIdentity.translate(width / 2 - x * k, height / 2 - y * k).scale(k);
  };
  return {
    get at() {
      return at;
    },
    size,
    go,
    /** Shows a whole rectangle; `atLeast`: no smaller than this, then its top is shown. */
    fit(box, { atLeast = FARTHEST, animated = true } = {}) {
      const [width, height] = size();
      const whole = Math.min((width - 40) / box.width, (height - 40) / box.height, 1.2);
      const k = Math.max(whole, atLeast);
      const y = whole >= atLeast ? height / 2 - (box.y + box.height / 2) * k : 20 - box.y * k;
      go(d3.zoomIdentity.translate(width / 2 - (box.x + box.width / 2) * k, y).scale(k), animated);
    },
    /** Brings a rectangle to the middle, near enough to be read. */
    centre(box, animated = true) {
      const k = Math.max(at.k, 0.85);
      go(centred(box.x + box.width / 2, box.y + box.height / 2, k), animated);
    },
    /** Moves so that a place is in the middle, as near as now. */
    lookAt(x, y) {
      go(centred(x, y, at.k), false);
    },
    zoom(factor) {
      selection.interrupt().call(zoom.scaleBy, factor);
    },
    pan(dx, dy) {
      selection.interrupt().call(zoom.translateBy, dx / at.k, dy / at.k);
    },
    /** Moves as little as brings a rectangle into sight. */
    intoSight(box) {
      const [width, height] = size();
      const [x, y] = at.apply([box.x, box.y]);
      const [right, bottom] = at.apply([box.x + box.width, box.y + box.height]);
      const dx = x < 20 ? 20 - x : Math.min(0, width - 20 - right);
      const dy = y < 20 ? 20 - y : Math.min(0, height - 20 - bottom);
      if (dx || dy) this.pan(dx, dy);
    },
    /** The rectangle of the graph that is seen, with `margin` times its size around it. */
    seen(margin) {
      const [width, height] = size();
      const [x, y] = at.invert([-width * margin, -height * margin]);
      const [right, bottom] = at.invert([width * (1 + margin), height * (1 + margin)]);
      return { x, y, right, bottom };
    },
  };
}
