"""HTTP: routes in OpenAI's and Anthropic's dialects over the engines of one process.

the process     run, app, settings, logs, metrics; before the routes: limits, security; behind them: errors
the models      opening, residency, registry; of each one: worker, the only thread that touches it, embedding_queue;
                of each request: generation
the routes      chat, completions, responses (response_input, response_events), messages (message_blocks), embeddings,
                tokens, models, page
their bodies    fields, sampling, structure, prompts, parts
a chat's turn   turn, template, vocabulary; what a text says: output, reasoning, tools, all of them on incremental
their answers   sse, connection, usage, logprobs
"""
