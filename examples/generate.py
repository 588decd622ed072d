"""One prompt: the whole answer at once, then another as a stream.

python examples/generate.py [MODEL]     a hub id, a short name, a folder or a GGUF file; by default the built-in model
"""

import sys

import bitnet_numba as bn

llm = bn.load(sys.argv[1] if len(sys.argv) > 1 else None)
prompt = [{"role": "user", "content": "Tell me a story about a fox and a lantern."}]

# Without parameters: greedy, the same on every run.
answer = llm.generate(prompt, max_new_tokens=60)
print(answer.text)
print(
    f"[{answer.finish_reason}; {answer.stats.generated_tokens} tokens, {answer.stats.tokens_per_second:.0f} tokens/s]\n"
)

# Sampled as the model's folder recommends, if it does; a seed makes it the same again.
stream = llm.stream(prompt, llm.sampling, seed=7, max_new_tokens=60, stop=["!"])
for piece in stream:
    print(piece, end="", flush=True)
print(f"\n[{stream.completion.finish_reason}]")
