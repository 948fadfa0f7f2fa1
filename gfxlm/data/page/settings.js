// What the reader has set, and what of it goes into a request.

const SETTINGS = "gfxlm.settings";
const KEY = "gfxlm.key";
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

/** Texts by name, as the fields hold them; an absent one is the server's choice. */
export function loadSettings() {
  return JSON.parse(localStorage.getItem(SETTINGS) ?? "{}");
}

export function saveSetting(name, text) {
  const settings = loadSettings();
  if (text === "") delete settings[name];
  else settings[name] = text;
  localStorage.setItem(SETTINGS, JSON.stringify(settings));
}

export function forgetSettings() {
  localStorage.removeItem(SETTINGS);
}

/** The fields of a chat request that come from the settings. */
export function requestOptions() {
  const settings = loadSettings();
  const options = Object.fromEntries(NUMBERS.filter((name) => name in settings).map((name) => [name, Number(settings[name])]));
  if (settings.thinking) options.chat_template_kwargs = { enable_thinking: settings.thinking === "on" };
  return options;
}

/** The key, and whether it outlives this tab. */
export function loadKey() {
  const kept = localStorage.getItem(KEY);
  return { key: kept ?? sessionStorage.getItem(KEY) ?? "", remembered: kept !== null };
}

export function saveKey(key, remember) {
  localStorage.removeItem(KEY);
  sessionStorage.removeItem(KEY);
  if (key) (remember ? localStorage : sessionStorage).setItem(KEY, key);
}
