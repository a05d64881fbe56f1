"""Replays a trace of jobs through any scheduler plugin: a library, no service; `kernelm simulate` is its command."""
