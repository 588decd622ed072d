"""Sampling the next token from logits, for one sequence and for a batch."""
