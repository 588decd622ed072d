"""What is told of an answer and of a full context, in one line each."""

from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.engine.completion import Completion


def describe(completion: Completion, conversation: Conversation) -> str:
    """Speed, context and memory of an answer."""
    stats, session = completion.stats, conversation.session
    if not stats.generated_tokens:
        return f"stopped before the answer began | context {session.held:,}/{session.capacity:,}"
    prefill = f"prefill {_tokens(stats.prompt_tokens - stats.reused_tokens)}"
    if stats.reused_tokens:
        prefill += f" (and {stats.reused_tokens:,} reused)"
    decode = f"answer {_tokens(stats.generated_tokens)}"
    if stats.generated_tokens > 1:
        decode += f", {stats.tokens_per_second:,.1f} tokens/s"
    memory = ", ".join(f"{name.replace('_', ' ')} {size / 1e6:,.1f} MB" for name, size in stats.memory.items())
    return (
        f"{prefill}, {stats.prefill_tokens_per_second:,.1f} tokens/s | {decode} | "
        f"context {session.held:,}/{session.capacity:,} | {memory}"
    )


def _tokens(number: int) -> str:
    return "1 token" if number == 1 else f"{number:,} tokens"


def forgotten(exchanges: int) -> str:
    """That the model no longer reads the oldest exchanges."""
    what = "the oldest exchange is" if exchanges == 1 else f"the {exchanges} oldest exchanges are"
    return f"[the context is full: {what} no longer read]"


def restart_advice(conversation: Conversation) -> str:
    """ "; or restart with a larger --context" if the model has one; otherwise nothing."""
    engine = conversation.engine
    return "; or restart with a larger --context" if engine.context < engine.config.max_context else ""
