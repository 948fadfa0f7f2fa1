// Chats in localStorage, one entry each, so that two tabs do not overwrite each other's.

const PREFIX = "gfxlm.chat.";
const TITLE_LENGTH = 60;

export const isChatKey = (key) => key === null || key.startsWith(PREFIX);

export function newChat() {
  return { id: `${Date.now().toString(36)}${Math.random().toString(36).slice(2, 8)}`, title: "", updated: 0, messages: [] };
}

/** The chat of this id, or null. */
export function loadChat(id) {
  try {
    return JSON.parse(localStorage.getItem(PREFIX + id));
  } catch {
    return null; // not one of ours, or cut off
  }
}

/** All chats, the latest first. */
export function loadChats() {
  const ids = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX)).map((key) => key.slice(PREFIX.length));
  return ids.map(loadChat).filter(Boolean).sort((a, b) => b.updated - a.updated);
}

/** Throws where the browser's storage is full. */
export function saveChat(chat) {
  const first = chat.messages.find((message) => message.role === "user")?.content.trim() ?? "";
  chat.title ||= first.split("\n", 1)[0].slice(0, TITLE_LENGTH) || "Untitled";
  localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
}

export function deleteChat(id) {
  localStorage.removeItem(PREFIX + id);
}
