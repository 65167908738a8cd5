// What is shown and chosen, in one place. Views ask to be told when a part of it changes.

export const state = {
  view: "graph",
  graph: 0,
  level: 0,
  colour: "type",
  parameters: false,
  chosen: null, // { kind: "node" | "module" | "site", ... }
};

const watchers = [];

/** Calls back with the new state when one of the named parts has changed. */
export function watch(names, call) {
  watchers.push([names.split(" "), call]);
}

/** Changes parts of the state, then tells who watches them. */
export function change(parts) {
  const changed = Object.keys(parts).filter((name) => state[name] !== parts[name]);
  Object.assign(state, parts);
  for (const [names, call] of watchers) if (names.some((name) => changed.includes(name))) call(state);
}
