// Copying, also where the page comes over plain HTTP and browsers offer no clipboard.

import { el, icon, iconButton } from "./dom.js";

async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = el("textarea", { value: text, className: "unseen" });
  document.body.append(field);
  field.select();
  const done = document.execCommand("copy");
  field.remove();
  if (!done) throw new Error("the browser does not let this page copy");
}

/** A button that copies what `text()` returns, and says so for a moment. */
export function copyButton(text, label = "Copy") {
  const button = iconButton("copy", label, async () => {
    const done = await copy(text()).then(() => true, () => false);
    button.replaceChildren(icon(done ? "check" : "close"));
    button.title = done ? "Copied" : "The browser does not let this page copy";
    setTimeout(() => {
      button.replaceChildren(icon("copy"));
      button.title = label;
    }, 1500);
  });
  return button;
}
