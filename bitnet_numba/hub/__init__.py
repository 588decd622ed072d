"""Models by name: downloaded from the Hugging Face hub, converted once, kept in a cache folder."""
