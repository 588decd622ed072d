"""Attention over a cache of keys and values: for one token, for a prompt, and for a batch with a paged cache."""
