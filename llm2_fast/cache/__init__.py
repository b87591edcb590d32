"""Key/value caches: committed prefixes, and the branches that may or may not join them."""
