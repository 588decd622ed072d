"""The built-in model: the text world it learns from, its training, its evaluation and the chart of its loss."""
