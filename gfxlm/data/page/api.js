// Requests to the server, and its refusals in words.

import { events } from "./sse.js";
import { loadKey } from "./settings.js";

/** What went wrong, in a sentence; `kind` is "key" where a key would help. */
export class Failure extends Error {
  constructor(message, kind = "other") {
    super(message);
    this.kind = kind;
  }
}

const UNREACHABLE = "The server cannot be reached. Is it still running?";
const LOST = "The connection was lost before the answer was complete. What had come is kept.";

async function refusal(response) {
  const body = await response.json().catch(() => null);
  const said = body?.error?.message ?? "";
  const wait = response.headers.get("Retry-After");
  switch (response.status) {
    case 401:
    case 403:
      return new Failure(loadKey().key ? "The server did not accept the API key." : "This server asks for an API key.", "key");
    case 413:
      return new Failure(`The chat is too long for the server. ${said}`);
    case 429:
      return new Failure(`The server is busy. Try again ${wait ? `in ${wait} s` : "in a moment"}.`);
    case 503:
      return new Failure("The server is not ready. It may still be loading the model: try again in a moment.");
  }
  if (response.status >= 500) return new Failure(`The server failed (${response.status}). ${said}`);
  return new Failure(said || `The server refused the request (${response.status}).`);
}

async function call(path, options = {}) {
  const { key } = loadKey();
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers }).catch((error) => {
    if (error.name === "AbortError") throw error;
    throw new Failure(UNREACHABLE);
  });
  if (!response.ok) throw await refusal(response);
  return response;
}

/** The names of the models that the server has. */
export async function listModels() {
  const response = await call("v1/models");
  const { data } = await response.json();
  return data.map((model) => model.id);
}

/** The chunks of a streamed answer; throws Failure, or AbortError once `signal` has fired. */
export async function* streamChat(request, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", { method: "POST", body, signal });
  try {
    for await (const data of events(response.body)) {
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new Failure(chunk.error.message);
      yield chunk;
    }
  } catch (error) {
    if (error instanceof Failure || error.name === "AbortError") throw error;
  }
  throw new Failure(LOST);
}
