// Two levels side by side. The sites that both have stand beside each other; between two of them, the longest common
// sequence of operations does; the rest was removed or added.

/** Rows { left, right, mark } of two lists of nodes; mark: "same", "changed", "removed" or "added". */
export function align(before, after) {
  const pairs = anchors(before, after);
  const rows = [];
  let [i, j] = [0, 0];
  for (const [x, y] of [...pairs, [before.length, after.length]]) {
    between(before.slice(i, x), after.slice(j, y), rows);
    if (x < before.length) rows.push(pair(before[x], after[y]));
    [i, j] = [x + 1, y + 1];
  }
  return rows;
}

function pair(left, right) {
  return { left, right, mark: told(left) === told(right) ? "same" : "changed" };
}

/** What a node says but for the numbers of its values. */
function told(node) {
  return `${node.text.replace(/%\d+/g, "%")}|${node.dtype}|${node.shape}`;
}

/** Places of the sites' own operations in both, those that come in one order. */
function anchors(before, after) {
  const places = lastOfSites(after);
  const pairs = [...lastOfSites(before)].filter(([site]) => places.has(site)).map(([site, x]) => [x, places.get(site)]);
  pairs.sort((a, b) => a[0] - b[0]);
  return rising(pairs);
}

function lastOfSites(nodes) {
  const found = new Map();
  nodes.forEach((node, i) => node.site && node.kind === "call" && found.set(node.site, i));
  return found;
}

/** The longest run of pairs whose second numbers rise. */
function rising(pairs) {
  const ends = [];
  const before = pairs.map(() => -1);
  pairs.forEach(([, y], i) => {
    const at = d3.bisector((k) => pairs[k][1]).left(ends, y);
    if (at > 0) before[i] = ends[at - 1];
    ends[at] = i;
  });
  const found = [];
  for (let i = ends.at(-1) ?? -1; i >= 0; i = before[i]) found.unshift(pairs[i]);
  return found;
}

const SQUARE = 4e6; // of the table that a common sequence needs; longer stretches are paired by position

function between(left, right, rows) {
  const key = (node) => `${node.kind}|${node.op}|${node.module}`;
  const [a, b] = [left.map(key), right.map(key)];
  let [i, j] = [0, 0];
  for (const [x, y] of a.length * b.length > SQUARE ? samePlaces(a, b) : common(a, b)) {
    while (i < x) rows.push({ left: left[i++], right: null, mark: "removed" });
    while (j < y) rows.push({ left: null, right: right[j++], mark: "added" });
    rows.push(pair(left[i++], right[j++]));
  }
  while (i < a.length) rows.push({ left: left[i++], right: null, mark: "removed" });
  while (j < b.length) rows.push({ left: null, right: right[j++], mark: "added" });
}

function samePlaces(a, b) {
  return a.flatMap((each, i) => (each === b[i] ? [[i, i]] : []));
}

function common(a, b) {
  const width = b.length + 1;
  const best = new Uint32Array((a.length + 1) * width);
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      const at = i * width + j;
      best[at] = a[i] === b[j] ? best[at + width + 1] + 1 : Math.max(best[at + width], best[at + 1]);
    }
  }
  const found = [];
  for (let [i, j] = [0, 0]; i < a.length && j < b.length; ) {
    if (a[i] === b[j]) found.push([i++, j++]);
    else if (best[(i + 1) * width + j] >= best[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return found;
}
