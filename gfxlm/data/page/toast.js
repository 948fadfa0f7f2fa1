// A word at the lower edge that goes by itself.

import { byId, el } from "./dom.js";

const SECONDS = 8;
let timer;

export function toast(text, label, action) {
  const box = byId("toast");
  const hide = () => (box.hidden = true);
  box.replaceChildren(text);
  if (label) box.append(el("button", { type: "button", onclick: () => (hide(), action()) }, label));
  box.hidden = false;
  clearTimeout(timer);
  timer = setTimeout(hide, SECONDS * 1000);
}
