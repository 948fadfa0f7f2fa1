// Elements out of plain data. Text only ever becomes text nodes, so nothing a model says is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

export const byId = (id) => document.getElementById(id);

/** An element with these properties (attributes where the name has a dash or is `role`) and these children. */
export function el(tag, properties = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.includes("-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

/** A drawing out of icons.svg, in the colour of the text. */
export function icon(name) {
  const svg = document.createElementNS(SVG, "svg");
  const use = document.createElementNS(SVG, "use");
  svg.setAttribute("aria-hidden", "true");
  use.setAttribute("href", `page/icons.svg#${name}`);
  svg.append(use);
  return svg;
}

/** A button that is only a drawing; `label` is what it is called. */
export function iconButton(name, label, onclick, className = "") {
  return el("button", { type: "button", className: `icon ${className}`, title: label, "aria-label": label, onclick }, icon(name));
}
