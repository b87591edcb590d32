"""Hugging Face models: loading, fingerprints, and forward passes over branches."""
