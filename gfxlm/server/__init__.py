"""OpenAI-compatible HTTP over the engine. `worker` runs a model in a thread; nothing else here touches one."""
