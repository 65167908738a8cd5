// Asks the worker where the boxes lie. Where a browser gives a page no worker, the same code runs here.

import { byId } from "./dom.js";
import { boxSize } from "./shapes.js";

let worker = null;
let asked = 0;
const waiting = new Map();

function workerUrl() {
  const parts = [byId("dagre").textContent, "\n", byId("layout-worker").textContent];
  return URL.createObjectURL(new Blob(parts, { type: "text/javascript" }));
}

function receive(reply) {
  waiting.get(reply.number)?.(reply.layouts);
  waiting.delete(reply.number);
}

async function startWorker() {
  const url = workerUrl();
  try {
    worker = new Worker(url);
    worker.onmessage = (event) => receive(event.data);
  } catch {
    await new Promise((done, failed) => {
      const script = document.createElement("script");
      Object.assign(script, { src: url, onload: done, onerror: failed });
      document.head.append(script);
    });
    worker = { postMessage: (request) => receive(globalThis.layOutHere(request)) };
  }
}

/** Map of module key to layout, for the root and the modules in `open`. */
export async function layOutTree(root, open) {
  if (!worker) await startWorker();
  asked += 1;
  const request = { number: asked, box: boxOf(root, open) };
  return new Promise((done) => {
    waiting.set(request.number, done);
    worker.postMessage(request);
  });
}

function boxOf(module, open) {
  const place = new Map(module.children.map((child, i) => [child, i]));
  const nodes = module.children.map((child) =>
    child.children && open.has(child.key) ? boxOf(child, open) : { key: child.key, ...boxSize(child) },
  );
  const edges = [...module.links.values()].map(([from, to]) => [place.get(from), place.get(to)]);
  const places = (items) => [...items].map((item) => place.get(item));
  const least = module.parent ? boxSize(module).width : 0;
  return { key: module.key, nodes, edges, entries: places(module.entries), exits: places(module.exits), least };
}
