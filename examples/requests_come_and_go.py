"""The scheduler, as a server uses it: requests are added and cancelled while others run.

python examples/requests_come_and_go.py [MODEL]
"""

import sys

import bitnet_numba as bn

with bn.load(sys.argv[1] if len(sys.argv) > 1 else None) as llm, llm.scheduler(max_sequences=2) as scheduler:

    def ask(text: str) -> int:
        """Adds a question; what comes of it carries the number."""
        return scheduler.add([{"role": "user", "content": text}], max_new_tokens=30)

    texts = {ask(text): "" for text in ("Hello!", "Tell me a story about a bear.", "Tell me a story about an owl.")}
    rounds = 0
    while scheduler.busy:  # (a server's thread waits instead: `while scheduler.wait():`)
        rounds += 1
        if rounds == 5:  # while the others are under way: one more, and one that nobody wants any longer
            texts[ask("Who are you?")] = ""
            scheduler.cancel(1)
        for update in scheduler.step():
            texts[update.request] += update.text
            if update.completion is not None:
                print(f"request {update.request} ended: {update.completion.finish_reason}")
            elif update.error is not None:
                print(f"request {update.request} failed: {update.error}")

for number, text in texts.items():
    print(f"{number}: {text}")
