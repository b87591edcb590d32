"""Token quality exploration: which tokens of a model lead its solutions astray (LLM2, section 2.3)."""
