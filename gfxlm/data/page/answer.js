// An answer that grows: what a stream's chunks make of a message.

export function newAnswer(model) {
  return { role: "assistant", content: "", reasoning: "", toolCalls: [], model };
}

function addToolCalls(answer, deltas) {
  for (const { index, id, function: part } of deltas) {
    const call = (answer.toolCalls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
    call.function.name += part?.name ?? "";
    call.function.arguments += part?.arguments ?? "";
  }
}

/** Put one chunk's text, calls and counts into the answer. */
export function addChunk(answer, chunk) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  answer.content += delta.content ?? "";
  answer.reasoning += delta.reasoning_content ?? delta.reasoning ?? "";
  addToolCalls(answer, delta.tool_calls ?? []);
  if (choice?.finish_reason) answer.finish = choice.finish_reason;
  if (chunk.usage) answer.usage = chunk.usage;
  if (chunk.timings) answer.timings = chunk.timings;
}

/** The messages as a request has them: without thoughts, and without answers of which nothing came. */
export function asRequest(messages, system) {
  const sent = messages.filter((message) => message.role === "user" || message.content || message.toolCalls.length);
  return [
    ...(system ? [{ role: "system", content: system }] : []),
    ...sent.map(({ role, content, toolCalls }) => (toolCalls?.length ? { role, content, tool_calls: toolCalls } : { role, content })),
  ];
}

/** The counts in one line, such as "41.2 tokens/s · 310 tokens · prompt 96 (64 cached)". */
export function describeCounts({ usage, timings }) {
  const parts = [];
  const tokens = usage?.completion_tokens ?? timings?.predicted_n;
  const prompt = usage?.prompt_tokens;
  const cached = usage?.prompt_tokens_details?.cached_tokens ?? timings?.cache_n ?? 0;
  if (timings?.predicted_per_second) parts.push(`${timings.predicted_per_second.toFixed(1)} tokens/s`);
  if (tokens !== undefined) parts.push(`${tokens} ${tokens === 1 ? "token" : "tokens"}`);
  if (prompt !== undefined) parts.push(`prompt ${prompt}${cached ? ` (${cached} cached)` : ""}`);
  return parts.join(" · ");
}
