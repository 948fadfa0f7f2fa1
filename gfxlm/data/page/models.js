// The choice of a model, and the banner that says why there is none.

import { listModels } from "./api.js";
import { byId, el } from "./dom.js";
import { openSettings } from "./panel.js";
import { loadSettings, saveSetting } from "./settings.js";

const select = byId("model");
const banner = byId("banner");

/** The chosen model's name; undefined while none is known. */
export const chosenModel = () => select.value || undefined;

/** Ask the server what it has. */
export async function refreshModels() {
  try {
    const names = await listModels();
    const { model } = loadSettings();
    select.replaceChildren(...names.map((name) => el("option", { value: name }, name)));
    if (names.includes(model)) select.value = model;
    select.disabled = names.length < 2;
    banner.hidden = true;
  } catch (error) {
    const wantsKey = error.kind === "key";
    const button = el("button", { type: "button", className: "quiet", onclick: wantsKey ? () => openSettings("api-key") : refreshModels });
    button.append(wantsKey ? "Enter a key" : "Try again");
    banner.replaceChildren(el("span", {}, error.message), button);
    banner.hidden = false;
  }
}

select.addEventListener("change", () => saveSetting("model", select.value));
