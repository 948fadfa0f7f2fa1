// The list of chats: open, rename, delete.

import { byId, el, iconButton } from "./dom.js";
import { deleteChat, loadChats, saveChat } from "./store.js";
import { toast } from "./toast.js";

const narrow = matchMedia("(max-width: 48rem)");
const opener = byId("open-sidebar");

/** On a narrow screen the list lies over the page. */
export function openSidebar(open) {
  document.body.classList.toggle("sidebar-open", open);
  opener.setAttribute("aria-expanded", String(open));
  if (!narrow.matches) return;
  (open ? byId("close-sidebar") : opener).focus();
}

/** List the chats; `current` and `writing` are ids, `onChange` is called once one is gone or back. */
export function showChats(current, writing, onChange) {
  const items = loadChats().map((chat) => item(chat, chat.id === current, writing.has(chat.id), onChange));
  byId("chats").replaceChildren(...items);
}

function item(chat, isCurrent, isWriting, onChange) {
  const link = el("a", { href: `#${chat.id}`, title: chat.title }, chat.title);
  if (isCurrent) link.setAttribute("aria-current", "page");
  const row = el("li", { className: isWriting ? "writing" : "" }, link);
  row.append(
    iconButton("edit", `Rename ${chat.title}`, () => row.replaceChildren(renamer(chat, onChange))),
    iconButton("trash", `Delete ${chat.title}`, () => remove(chat, onChange)),
  );
  return row;
}

function renamer(chat, onChange) {
  const field = el("input", { value: chat.title, "aria-label": "Title of the chat", maxLength: 120 });
  const finish = (keep) => {
    field.onblur = null; // the field goes, which would call this again
    if (keep && field.value.trim()) saveChat(Object.assign(chat, { title: field.value.trim() }));
    onChange(chat);
  };
  field.onblur = () => finish(true);
  field.onkeydown = (event) => {
    if (event.key === "Enter" || event.key === "Escape") {
      event.stopPropagation();
      finish(event.key === "Enter");
    }
  };
  queueMicrotask(() => field.select());
  return field;
}

function remove(chat, onChange) {
  deleteChat(chat.id);
  onChange(null, chat.id);
  toast("Deleted.", "Undo", () => {
    saveChat(chat);
    onChange(chat);
  });
}
