"""The built-in model: its world of stories, its data, and its model for training.

The commands are `tools/train_demo.py` and `tools/eval_demo.py`.
"""
