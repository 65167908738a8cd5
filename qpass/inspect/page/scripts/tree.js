// A level's nodes as a tree of modules. A module that holds one module and nothing else shares its name with it, one
// that holds one node is that node, and where more than LARGEST stand beside each other they go into blocks: a layout's
// time grows faster than its nodes.

import { sitesOf } from "./data.js";

const LARGEST = 120;
const BLOCK = 60;

/** { root, leaves: Map of id to leaf, modules: Map of path to module, or to the one node it is } of a level's nodes. */
export function buildTree(nodes, withParameters) {
  const root = module("", "", null);
  const tree = { root, leaves: new Map(), modules: new Map([["", root]]), nodes };
  for (const node of nodes) {
    if (node.kind === "parameter" && !withParameters) continue;
    const parent = moduleAt(tree, node.module);
    const leaf = { key: `n${node.id}`, node, parent, sites: sitesOf(node) };
    parent.children.push(leaf);
    tree.leaves.set(node.id, leaf);
  }
  shorten(root, tree);
  inBlocks(root);
  summed(root, 0);
  return tree;
}

function module(path, name, parent) {
  return { key: `m${path}`, path, name, parent, children: [], operations: 0, sites: [], depth: 0 };
}

function moduleAt(tree, path) {
  const known = tree.modules.get(path);
  if (known) return known;
  const cut = path.lastIndexOf(".");
  const parent = moduleAt(tree, cut < 0 ? "" : path.slice(0, cut));
  const name = path.slice(cut + 1);
  const counted = /^\d+$/.test(name) && parent.path; // layers.0 says more than 0
  const made = module(path, counted ? path.slice(parent.path.lastIndexOf(".") + 1) : name, parent);
  parent.children.push(made);
  tree.modules.set(path, made);
  return made;
}

function shorten(parent, tree) {
  parent.children.forEach((child, i) => {
    if (!child.children) return;
    let inner = child;
    while (inner.children.length === 1 && inner.children[0].children) {
      inner = inner.children[0];
      inner.name = child.name + inner.path.slice(child.path.length);
      tree.modules.set(inner.parent.path, inner);
    }
    const [only] = inner.children;
    const shown = inner.children.length === 1 ? Object.assign(only, { name: inner.name }) : inner;
    tree.modules.set(inner.path, shown);
    shown.parent = parent;
    parent.children[i] = shown;
    if (shown === inner) shorten(inner, tree);
  });
}

function inBlocks(parent) {
  for (const child of parent.children) if (child.children) inBlocks(child);
  while (parent.children.length > LARGEST) {
    const blocks = [];
    for (let at = 0; at < parent.children.length; at += BLOCK) blocks.push(block(parent, at));
    parent.children = blocks;
  }
}

function block(parent, at) {
  const children = parent.children.slice(at, at + BLOCK);
  const first = children[0].firstNumber ?? at + 1;
  const last = children.at(-1).lastNumber ?? at + children.length;
  const made = { ...module(parent.path, `part ${first}–${last}`, parent), block: true };
  Object.assign(made, { key: `b${parent.path}:${first}-${last}`, children, firstNumber: first, lastNumber: last });
  for (const child of children) child.parent = made;
  return made;
}

function summed(parent, depth) {
  parent.depth = depth;
  const sites = new Set();
  for (const child of parent.children) {
    if (child.children) summed(child, depth + 1);
    parent.operations += child.children ? child.operations : 1;
    for (const site of child.sites) sites.add(site);
  }
  parent.sites = [...sites];
}

/** The modules that an item lies in, the innermost first, without the root. */
export function around(item) {
  const found = [];
  for (let at = item.parent; at && at.parent; at = at.parent) found.push(at);
  return found;
}

/** The modules to open at first: the outermost, as long as no more than `most` boxes are seen. */
export function openAtFirst(root, most = 48) {
  const open = new Set();
  let seen = root.children.length;
  let level = [root];
  while (level.length) {
    const next = level.flatMap((each) => each.children.filter((child) => child.children));
    const more = next.reduce((sum, each) => sum + each.children.length, 0);
    if (!next.length || seen + more > most) break;
    for (const each of next) open.add(each.key);
    seen += more;
    level = next;
  }
  return open;
}
