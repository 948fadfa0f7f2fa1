// The settings' dialog: every field is kept as soon as it is valid.

import { byId } from "./dom.js";
import { forgetSettings, loadKey, loadSettings, saveKey, saveSetting } from "./settings.js";

const dialog = byId("settings");
const form = byId("settings-form");
const key = byId("api-key");
const remember = byId("remember-key");

function fill() {
  const settings = loadSettings();
  for (const field of form.elements) if (field.name) field.value = settings[field.name] ?? "";
  const kept = loadKey();
  key.value = kept.key;
  remember.checked = kept.remembered;
}

export function openSettings(field) {
  fill();
  dialog.showModal();
  if (field) byId(field).focus();
}

/** `onKey` is called after the key, `onFormat` after the way of showing answers has changed. */
export function setUpSettings({ onKey, onFormat }) {
  form.addEventListener("input", ({ target }) => {
    if (target.name && target.reportValidity()) saveSetting(target.name, target.value);
    if (target.name === "format") onFormat();
  });
  form.addEventListener("reset", (event) => {
    event.preventDefault();
    const { model } = loadSettings();
    forgetSettings();
    if (model) saveSetting("model", model);
    fill();
    onFormat();
  });
  for (const field of [key, remember]) field.addEventListener("input", () => saveKey(key.value.trim(), remember.checked));
  dialog.addEventListener("close", onKey);
  // A click on the dark around the dialog counts as one on the dialog itself.
  dialog.addEventListener("click", ({ target }) => target === dialog && dialog.close());
}
