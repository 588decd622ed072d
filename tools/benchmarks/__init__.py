"""What `tools/bench.py` measures, part by part, and the charts of it."""
