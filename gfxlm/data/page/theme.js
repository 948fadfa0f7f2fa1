// Light or dark: as the system has it until the reader chooses. Loaded first, so that the page never flashes.

const KEY = "gfxlm.theme";
const system = matchMedia("(prefers-color-scheme: dark)");

function apply() {
  const chosen = localStorage.getItem(KEY);
  if (chosen) document.documentElement.dataset.theme = chosen;
  else delete document.documentElement.dataset.theme;
}

/** The other of the two; the system's own is kept as "no choice", so that the page follows it again. */
export function toggleTheme() {
  const shown = localStorage.getItem(KEY) ?? (system.matches ? "dark" : "light");
  const wanted = shown === "dark" ? "light" : "dark";
  if ((wanted === "dark") === system.matches) localStorage.removeItem(KEY);
  else localStorage.setItem(KEY, wanted);
  apply();
}

apply();
