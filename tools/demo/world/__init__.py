"""A text world for a small language model: children's stories, questions about them, and a little talk around them."""
