"""What tools/bench.py measures: one file for each part, the Markdown tables and the charts."""
