"""Many prompts at once: decoded together, each answer as if it were alone.

python examples/batch.py [MODEL]
"""

import sys

import bitnet_numba as bn

animals = ["a fox", "a hen", "a whale", "a mouse"]
prompts = [[{"role": "user", "content": f"Tell me a story about {animal}."}] for animal in animals]

with bn.load(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
    # One for all of them would do, too; with a seed in it, all would draw alike.
    params = [bn.SamplingParams(temperature=0.8, top_p=0.95, seed=seed) for seed in range(len(prompts))]
    answers = llm.generate_batch(prompts, params, max_new_tokens=40)
    for animal, answer in zip(animals, answers, strict=True):
        print(f"{animal}: {answer.text}")

    alone = llm.generate(prompts[2], params[2], max_new_tokens=40)
    print("alone, the third answer is", "the same" if alone.text == answers[2].text else "another")
