"""Prompts in, completions out, over any backend: `engine.load` opens a model."""
