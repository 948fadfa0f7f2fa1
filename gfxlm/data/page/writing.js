// Answers on their way, one for each chat at most. They go on while another chat is read.

import { addChunk, asRequest, newAnswer } from "./answer.js";
import { Failure, streamChat } from "./api.js";
import { loadSettings, requestOptions } from "./settings.js";

const runs = new Map(); // a chat's id -> { chat, abort }

export const isWriting = (id) => runs.has(id);
export const writingChats = () => new Set(runs.keys());
/** The chat as its answer grows, which is newer than the stored one. */
export const writtenChat = (id) => runs.get(id)?.chat;
export const stopWriting = (id) => runs.get(id)?.abort.abort();

/** Answer the chat's last question; `onGrowth` is called after every chunk. Never throws: the answer says what failed. */
export async function write(chat, model, onGrowth) {
  const abort = new AbortController();
  const request = { model, messages: asRequest(chat.messages, loadSettings().system), ...requestOptions() };
  const answer = newAnswer(model);
  chat.messages.push(answer);
  runs.set(chat.id, { chat, abort });
  try {
    for await (const chunk of streamChat(request, abort.signal)) {
      addChunk(answer, chunk);
      onGrowth();
    }
  } catch (error) {
    if (error.name === "AbortError") answer.finish = "stopped";
    else if (error instanceof Failure) answer.error = { message: error.message, kind: error.kind };
    else answer.error = { message: `This page failed: ${error.message}`, kind: "other" };
  } finally {
    runs.delete(chat.id);
  }
}
