"""A conversation at the keyboard, until end of input: each turn computes only what is new in it.

python examples/chat_loop.py [MODEL]

`bitnet-numba chat` is the same with all comforts.
"""

import sys

import bitnet_numba as bn

llm = bn.load(sys.argv[1] if len(sys.argv) > 1 else None)
messages: list[dict[str, object]] = []

with llm.session() as session:
    while True:
        try:
            messages.append({"role": "user", "content": input("> ")})
        except EOFError:
            break
        try:
            stream = session.stream(messages, llm.sampling)
            for piece in stream:
                print(piece, end="", flush=True)
        except bn.ContextFull as error:
            print(f"{error}: starting anew")
            messages.clear()
            continue
        answer = stream.completion
        # With its token ids, the answer is found in the context as it was generated, token for token.
        messages.append({"role": "assistant", "content": answer.text, "token_ids": answer.token_ids})
        print(f"\n[{answer.stats.reused_tokens} of {answer.stats.prompt_tokens} prompt tokens were there already]")
