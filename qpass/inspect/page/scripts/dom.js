// Elements are made here and only here: text goes in as text and attributes as attributes, never as markup.

const SVG = "http://www.w3.org/2000/svg";

/** The element of an identity that the template has. */
export function byId(identity) {
  return document.getElementById(identity);
}

/** An HTML element. attributes: `text`, `on` (listeners), `style` (properties), all others as they are; null: left out. */
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

/** An SVG element, made as `element` does. */
export function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, call] of Object.entries(value)) node.addEventListener(event, call);
    else if (name === "style") for (const [key, each] of Object.entries(value)) node.style.setProperty(key, each);
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

/** Says something to those who do not see the page. */
export function say(text) {
  byId("said").textContent = text;
}

/** The call, at most once a frame. */
export function oncePerFrame(call) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      call();
    });
  };
}
