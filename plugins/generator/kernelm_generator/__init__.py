"""`server/1` for causal language models: chats and prompts, many at a time, streamed."""
