"""LLM2 inside other decoding loops. Each module needs only the stack that it is named after."""
