"""`server/1` with vLLM."""
