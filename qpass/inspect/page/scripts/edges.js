// Which boxes of a module an arrow joins. An edge between two nodes is drawn where their modules meet; from there it
// goes in through the top of each module it enters, and out at the bottom.

/** Gives each module of a tree `links` (pairs of children), `entries` and `exits` (children that the outside feeds, reads). */
export function linkChildren(tree) {
  for (const each of everyModule(tree.root)) Object.assign(each, { links: new Map(), entries: new Set(), exits: new Set() });
  for (const leaf of tree.leaves.values()) {
    for (const input of leaf.node.inputs) {
      const source = tree.leaves.get(input);
      if (source && source !== leaf) join(source, leaf);
    }
  }
}

/** A module and all in it. */
export function* everyModule(module) {
  yield module;
  for (const child of module.children) if (child.children) yield* everyModule(child);
}

function join(source, target) {
  const [up, down] = [chain(source), chain(target)];
  let shared = 0;
  while (up[shared + 1] && up[shared + 1] === down[shared + 1]) shared += 1;
  const [from, to] = [up[shared + 1], down[shared + 1]];
  up[shared].links.set(`${from.key}>${to.key}`, [from, to]);
  for (let i = shared + 1; i < up.length - 1; i += 1) up[i].exits.add(up[i + 1]);
  for (let i = shared + 1; i < down.length - 1; i += 1) down[i].entries.add(down[i + 1]);
}

/** From the root down to the item. */
function chain(item) {
  const found = [item];
  while (found[0].parent) found.unshift(found[0].parent);
  return found;
}

/** Ids of the nodes that read each node, of all nodes of a level. */
export function readers(nodes) {
  const found = new Map(nodes.map((node) => [node.id, []]));
  for (const node of nodes) for (const input of node.inputs) found.get(input)?.push(node.id);
  return found;
}
