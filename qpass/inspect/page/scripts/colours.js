// Colours that colour-blind readers can tell apart: Okabe and Ito's eight for types, cividis for figures.
// Yellow is what to look at: the worst error, the most loss, the most time.

import { report } from "./data.js";
import { MODES, typeCounts } from "./values.js";

const TYPES = ["#0072b2", "#009e73", "#56b4e9", "#cc79a7", "#e69f00", "#f0e442"];
const FLOAT = "#d55e00";

const types = typeCounts(report.sites)
  .map(([text]) => text)
  .filter((text) => text !== "float");
const typeColours = new Map([["float", FLOAT], ...types.map((text, i) => [text, TYPES[i % TYPES.length]])]);

/** The colour of a type's text. */
export function typeColour(text) {
  return typeColours.get(text);
}

/** The extent of a mode's figure over all sites, or null where none was measured. */
export function extent(mode) {
  const [low, high] = d3.extent(report.sites.map((site) => MODES[mode].of([site])).filter((value) => value !== null));
  return low === undefined ? null : [low, high];
}

const scales = new Map();

function scaleOf(mode) {
  if (!scales.has(mode)) {
    const found = extent(mode);
    const spread = found && found[0] > 0 && found[1] / found[0] > 100;
    const scale = (spread ? d3.scaleLog() : d3.scaleLinear()).domain(found ?? [0, 1]);
    scales.set(mode, scale.range(MODES[mode].smallIsBad ? [1, 0] : [0, 1]).clamp(true));
  }
  return scales.get(mode);
}

/** The colour of a figure in a mode; null where there is no figure. */
export function figureColour(mode, value) {
  return value === null ? null : d3.interpolateCividis(scaleOf(mode)(value));
}

/** The figure a share 0..1 along the scale stands for. */
export function figureAt(mode, share) {
  return scaleOf(mode).invert(share);
}

/** Black or white, whichever is read better on a colour. */
export function inkOn(colour) {
  return d3.lab(colour).l > 58 ? "#111" : "#fff";
}
