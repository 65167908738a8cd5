// What a colour says of a box: the worst of its sites, or the sum of their times.

import { typesOf } from "./data.js";

const worst = (pick, key) => (sites) => {
  const known = sites.map((site) => site[key]).filter((value) => value !== null && value !== undefined);
  return known.length ? known.reduce((a, b) => pick(a, b)) : null;
};

/** Ways to colour: its name, the figure of some sites, whether small is bad, and the unit. */
export const MODES = {
  type: { name: "Type" },
  sqnr: { name: "Error (SQNR)", of: worst(Math.min, "sqnr"), smallIsBad: true, unit: "dB", bad: "worst", good: "best" },
  loss: { name: "Loss alone", of: worst(Math.max, "loss_alone"), unit: "", bad: "most", good: "least" },
  time: { name: "Time", of: worst((a, b) => a + b, "milliseconds"), unit: "ms", bad: "most", good: "least" },
};

/** Sites of each type, most frequent first: [[text, count]]. */
export function typeCounts(sites) {
  const counts = new Map();
  for (const site of sites) counts.set(typesOf(site), (counts.get(typesOf(site)) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}
