"""The logits of the NumPy reference, which is the specification, beside those of a fast backend.

python examples/compare_backends.py [MODEL] [cpu | cuda]

They add float32 numbers in another order. That changes last bits, and now and then an activation that lies on a border
becomes the next int8 value, which changes more.
"""

import sys

import numpy as np

import bitnet_numba as bn

model = sys.argv[1] if len(sys.argv) > 1 else None
fast = sys.argv[2] if len(sys.argv) > 2 else "cpu"

logits = {}
for backend in ("reference", fast):
    with bn.load(model, backend=backend, context=256) as llm:
        ids = llm.tokenizer.encode_chat([{"role": "user", "content": "Tell me a story about a fox and a lantern."}])
        logits[backend] = llm.logits(ids)  # float32 [T, vocab]: after each token of the prompt

expected, found = logits["reference"], logits[fast]
print(f"{len(ids)} tokens, {expected.shape[1]} logits after each, standard deviation {expected.std():.3f}")
difference = np.abs(found - expected)
print(f"differences: median {np.median(difference):.1e}, largest {difference.max():.1e}")
agree = (found.argmax(1) == expected.argmax(1)).mean()
print(f"most likely next token is the same after {agree:.0%} of the tokens")
