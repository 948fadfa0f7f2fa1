// The page: which chat is shown, and what every control does.

import { focusQuestion, setUpComposer, showWriting } from "./composer.js";
import { byId, icon } from "./dom.js";
import { AnswerView, questionView } from "./message.js";
import { chosenModel, refreshModels } from "./models.js";
import { openSettings, setUpSettings } from "./panel.js";
import { followEnd } from "./scroll.js";
import { loadSettings } from "./settings.js";
import { openSidebar, showChats } from "./sidebar.js";
import { isChatKey, loadChat, newChat, saveChat } from "./store.js";
import { toggleTheme } from "./theme.js";
import { toast } from "./toast.js";
import { isWriting, stopWriting, write, writingChats, writtenChat } from "./writing.js";

const SAVE_EVERY = 1000; // milliseconds, while an answer grows
const transcript = byId("transcript");
const ICONS = { "open-sidebar": "menu", "close-sidebar": "close", theme: "theme", "open-settings": "settings", "close-settings": "close" };
const MORE_ICONS = { send: "send", stop: "stop", "to-end": "down", "new-chat": "plus" };

let chat = newChat();
let answerView = null; // of the last answer that is shown
let frame = 0;
const end = followEnd(byId("scroller"), byId("to-end"));

function keep(changed) {
  try {
    saveChat(changed);
  } catch {
    toast("The browser’s storage is full: this chat is not kept. Delete some older ones.");
  }
}

const listChats = () => showChats(chat.id, writingChats(), chatChanged);

function messageView(message, index) {
  if (message.role === "user") return questionView(message, (text) => ask(text, index));
  const plain = loadSettings().format === "plain";
  answerView = new AnswerView(message, { plain, onAgain: answerAgain, onKey: () => openSettings("api-key") });
  answerView.update(isWriting(chat.id) && message === chat.messages.at(-1));
  return answerView.node;
}

function showChat() {
  transcript.replaceChildren(...chat.messages.map(messageView));
  byId("empty").hidden = chat.messages.length > 0;
  document.title = chat.title ? `${chat.title} · gfxlm` : "gfxlm";
  showWriting(isWriting(chat.id));
  listChats();
  end.toEnd();
}

function openChat(id) {
  chat = writtenChat(id) ?? loadChat(id) ?? newChat();
  showChat();
  focusQuestion();
}

/** A chat was renamed or brought back in the list, or (`gone`, its id) deleted. */
function chatChanged(changed, gone) {
  if (gone) stopWriting(gone);
  const open = writtenChat(changed?.id) ?? (changed?.id === chat.id ? chat : null);
  if (open) open.title = changed.title;
  if (gone === chat.id) startChat();
  else listChats();
}

function startChat() {
  // At once, not when the address has changed: the next key may already be part of the question.
  if (location.hash) history.pushState(null, "", location.pathname + location.search);
  openChat("");
}

/** Ask instead of the message at `index`, and what follows it. */
function ask(text, index = chat.messages.length) {
  if (isWriting(chat.id)) return;
  chat.messages.splice(index, Infinity, { role: "user", content: text });
  answer();
}

function answerAgain() {
  if (isWriting(chat.id)) return;
  if (chat.messages.at(-1).role === "assistant") chat.messages.pop();
  answer();
}

async function answer() {
  const written = chat;
  let saved = Date.now();
  written.updated = saved;
  keep(written);
  history.replaceState(null, "", `#${written.id}`);
  const grown = () => {
    if (Date.now() - saved > SAVE_EVERY && loadChat(written.id)) {
      saved = Date.now();
      keep(written);
    }
    if (written === chat) frame ||= requestAnimationFrame(() => redraw(isWriting(chat.id)));
  };
  const done = write(written, chosenModel(), grown);
  showChat();
  byId("status").textContent = "Writing an answer.";
  focusQuestion();
  await done;
  if (loadChat(written.id)) keep(written); // unless it was deleted
  if (written === chat) finish(written.messages.at(-1));
  listChats();
}

function redraw(writing) {
  cancelAnimationFrame(frame);
  frame = 0;
  answerView?.update(writing);
}

function finish(message) {
  redraw(false);
  showWriting(false);
  byId("status").textContent = message.error?.message ?? message.content;
}

function onKey(event) {
  if ((event.ctrlKey || event.metaKey) && event.key.toLowerCase() === "k") {
    event.preventDefault();
    startChat();
  } else if (event.key === "Escape" && !byId("settings").open) {
    if (document.body.classList.contains("sidebar-open")) openSidebar(false);
    else stopWriting(chat.id);
  }
}

for (const [id, name] of Object.entries({ ...ICONS, ...MORE_ICONS })) byId(id).prepend(icon(name));
setUpComposer(ask, () => stopWriting(chat.id));
setUpSettings({ onKey: refreshModels, onFormat: showChat });
byId("new-chat").addEventListener("click", () => (openSidebar(false), startChat()));
byId("theme").addEventListener("click", toggleTheme);
byId("open-settings").addEventListener("click", () => openSettings());
byId("open-sidebar").addEventListener("click", () => openSidebar(true));
for (const id of ["close-sidebar", "shade"]) byId(id).addEventListener("click", () => openSidebar(false));
document.addEventListener("keydown", onKey);
addEventListener("hashchange", () => {
  document.body.classList.remove("sidebar-open");
  openChat(location.hash.slice(1));
});
addEventListener("pagehide", () => isWriting(chat.id) && keep(chat));
addEventListener("storage", ({ key }) => isChatKey(key) && listChats());
openChat(location.hash.slice(1));
refreshModels();
