"""Backends: each runs prefill and decoding steps of LLM2 in its own way, with the same results."""
