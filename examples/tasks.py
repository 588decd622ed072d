"""asyncio: tasks share one scheduler, and the event loop is never held up.

python examples/tasks.py [MODEL]
"""

import asyncio
import sys

import bitnet_numba as bn


async def tell(llm: bn.Engine, thing: str) -> str:
    """A story's beginning; cancelling this task would end it after the step under way."""
    prompt = [{"role": "user", "content": f"Tell me a story about {thing}."}]
    pieces = [piece async for piece in llm.astream(prompt, max_new_tokens=30)]
    return f"{thing}: {''.join(pieces)}"


async def main() -> None:
    with bn.load(sys.argv[1] if len(sys.argv) > 1 else None) as llm:
        tasks = [asyncio.create_task(tell(llm, thing)) for thing in ("a drum", "a boat", "a cake")]
        for task in asyncio.as_completed(tasks):
            print(await task)
        answer = await llm.agenerate([{"role": "user", "content": "Hello!"}], max_new_tokens=20)
        print(answer.text)


asyncio.run(main())
