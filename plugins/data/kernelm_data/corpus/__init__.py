"""Corpora: masses of raw text become clean, deduplicated, tokenized shards. Reading order: pipeline, inputs, streams, formats,
first (what happens to every document), near, second (what is stored), report."""
