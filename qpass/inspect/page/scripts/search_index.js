// What can be searched, and in which order it is found: whole names, then beginnings of names, then any part.

import { report } from "./data.js";

/** Entries of sites, modules and operations of a level's tree. */
export function indexOf(tree) {
  const entries = report.sites.map((site) => entry("site", site.site, site.operation, { site }));
  if (!tree) return entries;
  for (const [path, item] of tree.modules) {
    if (path) entries.push(entry("module", path, "", item.children ? { module: item } : { leaf: item }));
  }
  for (const leaf of tree.leaves.values()) {
    const { node } = leaf;
    entries.push(entry(node.kind === "call" ? "op" : node.kind, node.op, node.text + " " + node.module, { leaf }));
  }
  return entries;
}

function entry(kind, name, more, target) {
  return { kind, name, more, low: name.toLowerCase(), rest: more.toLowerCase(), ...target };
}

/** The best `most` entries that hold every word, and how many hold them: { entries, count }. */
export function find(entries, text, most = 60) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  if (!words.length) return { entries: [], count: 0 };
  const ranked = [[], [], [], []];
  let count = 0;
  for (const each of entries) {
    const rank = rankOf(each, words);
    if (rank < 0) continue;
    count += 1;
    if (ranked[rank].length < most) ranked[rank].push(each);
  }
  return { entries: ranked.flat().slice(0, most), count };
}

function rankOf(each, words) {
  let rank = 0;
  for (const word of words) {
    const at = each.low.indexOf(word);
    if (at < 0 && !each.rest.includes(word)) return -1;
    rank = Math.max(rank, at < 0 ? 3 : rankAt(each.low, at, word.length));
  }
  return rank;
}

function rankAt(name, at, length) {
  if (at === 0 && length === name.length) return 0;
  return at === 0 || ".:_".includes(name[at - 1]) ? 1 : 2;
}
