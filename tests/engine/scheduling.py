"""An engine whose toy model ends answers now and then, requests to it, and what a session alone would answer."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.engine import Engine
from bitnet_numba.engine.scheduler import Scheduler
from bitnet_numba.engine.sequence import Update
from tests.engine.toy_backend import ToyBackend, toy_engine, toy_logits
from tests.strategies import sampling, some_ids

EOT = 1999
CONTEXT = 48
BEGINNING = list(range(100, 130))  # prompts share parts of it


def logits_that_end(ids: Sequence[int]) -> NDArray[np.float32]:
    """Toy logits after which a stop token comes now and then."""
    logits = toy_logits(ids)
    if sum(ids[-2:]) % 16 == 0:
        logits[EOT] = 100.0
    return logits


def engine(script: Sequence[int] = (), context: int = CONTEXT) -> tuple[Engine, ToyBackend]:
    llm, backend = toy_engine(script, context)
    backend.logits = logits_that_end
    return llm, backend


prompts = st.one_of(some_ids, st.integers(1, 30).map(lambda n: BEGINNING[:n]))
requests = st.fixed_dictionaries(
    {
        "prompt": st.builds(lambda a, b: (a + b)[:CONTEXT], st.integers(0, 30).map(lambda n: BEGINNING[:n]), prompts),
        "params": sampling,
        "max_new_tokens": st.one_of(st.none(), st.integers(1, 60)),
        "stop": st.sampled_from([(), "e", ["th", "a ", "on"], [" "]]),
    }
)


def alone(llm: Engine, request: dict[str, Any]) -> Completion:
    return llm.session().generate(**request)


def run(scheduler: Scheduler) -> list[Update]:
    updates = []
    while scheduler.busy:
        updates += scheduler.step()
    return updates


def same_answer(one: Completion, other: Completion) -> bool:
    return (one.text, one.token_ids, one.finish_reason, one.stats.prompt_tokens, one.stats.generated_tokens) == (
        (other.text, other.token_ids, other.finish_reason, other.stats.prompt_tokens, other.stats.generated_tokens)
    )
