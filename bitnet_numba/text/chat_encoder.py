"""Conversations as token ids: exactly those of the chat template's text, but for what messages must not write."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import tokenizers

from bitnet_numba.errors import RequestError, TokenizerError
from bitnet_numba.text.chat_template import ChatTemplate, Message, read_messages
from bitnet_numba.text.chat_trace import Trace, Tracer, space_behind
from bitnet_numba.text.guarded_encoder import GuardedEncoder
from bitnet_numba.text.template_process import TemplateLimit
from bitnet_numba.text.thoughts import CLOSE, OPEN, ThoughtReader, check_thoughts
from bitnet_numba.text.tool_messages import TAG, Tools, for_template

if TYPE_CHECKING:
    from bitnet_numba.text.stream_decoder import StreamDecoder

_PROBE = "\ud800"  # a content that no template writes itself
_TURNS = ("user", "assistant", "user")


class ChatEncoder:
    """Renders and encodes conversations with one template. Raises TokenizerError if the template cannot be used."""

    def __init__(self, backend: tokenizers.Tokenizer, source: str, variables: Mapping[str, object]):
        """source: of the template. variables: what it sees besides messages: bos_token, eos_token, ..."""
        self._template = ChatTemplate(source, variables)
        self._opened: dict[bool | None, bool] = {}  # by `thinking`: whether the template begins the thought
        added = backend.get_added_tokens_decoder()
        # Added tokens that the template writes around messages control turns, too, though they need not be special.
        turns = self._probe(_TURNS) + self._probe(("system", *_TURNS)) or source
        controls = {
            token.content: i
            for i, token in added.items()
            if token.special or (token.content in turns and _reads_like_a_marker(token.content))
        }
        self._guarded = GuardedEncoder(backend, controls)
        self._tracer = Tracer(list(controls))
        self._control_ids = frozenset(controls.values())
        self.end_of_turn = self._find_end_of_turn(controls)
        # What stands before and after a call of a function in an answer. Control tokens cannot: decoding skips them.
        tagged = self._template.takes_tools and f"<{TAG}>" in source and f"<{TAG}>" not in controls
        self.call_tags = (f"<{TAG}>\n", f"\n</{TAG}>") if tagged else ("", "")

    def trace(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool,
        continue_final_message: bool,
        tools: Tools | None = None,
        thinking: bool | None = None,
    ) -> tuple[list[dict[str, Any]], Trace]:
        """The messages as the template sees them, and the conversation rendered.

        continue_final_message: the text ends with the last content. tools: see `tool_messages`. thinking: see
        `check_thinking`. Raises RequestError for messages that cannot be used, and TokenizerError if the template
        fails.
        """
        self.check_thinking(thinking)
        messages, described = for_template(messages, tools, self._template)
        read = read_messages(messages, self._template)
        if continue_final_message and read[-1]["role"] != "assistant":
            raise RequestError("only an answer can be continued: the last message is not the assistant's")
        prompt = add_generation_prompt and not continue_final_message
        last = len(read) - 1
        marked = [i for i, m in enumerate(read) if m.get("token_ids") or (continue_final_message and i == last)]

        def render(sources: Sequence[dict[str, Any]]) -> str:
            return self._template.render(sources[:-1], prompt, sources[-1]["tools"], thinking)

        # The tools are traced like one more message: they must not write control tokens either.
        trace = self._tracer.trace(render, [*read, {"role": "", "tools": described}], marked)
        return read, trace.up_to_end_of(last, read[last]["content"]) if continue_final_message else trace

    def encode(
        self, messages: Sequence[dict[str, Any]], trace: Trace, new_stream: Callable[[], "StreamDecoder"]
    ) -> list[int]:
        """Token ids of a conversation that `trace` has rendered, without bos unless the template writes it.

        new_stream: makes decoders, which tell how much of an answer's ids stands in the text.
        """
        found = self._tracer.controls(trace)
        ids: list[int] = []
        position = 0

        def encode_to(end: int) -> None:
            inside = [(a - position, b - position, foreign) for a, b, foreign in found if position <= a and b <= end]
            ids.extend(self._guarded.encode(trace.text[position:end], inside, continues=bool(ids)))

        for message, start, end in trace.places:
            content, given = messages[message]["content"], messages[message].get("token_ids", [])
            given = given[: next((n for n, i in enumerate(given) if i in self._control_ids), None)]
            # The answer may begin with a space that the template removed, and wrote itself.
            start = max(start - len(content) + len(content.lstrip()), position)
            text = trace.text[start : space_behind(trace.text, end, content)]
            count, length = same_tokens(given, text, new_stream())
            if count:
                encode_to(start)
                ids.extend(given[:count])
                position = start + length
        encode_to(len(trace.text))
        return ids

    def check_thinking(self, thinking: bool | None) -> None:
        """Raises RequestError if the model is told to think, or not to, and the template has no switch for that."""
        check_thoughts(thinking, None)
        if thinking is not None and not self._template.switches_thinking:
            raise RequestError("this model's chat template has no switch for thinking (enable_thinking)")

    def thoughts(self, thinking: bool | None, begun: str | None) -> ThoughtReader | None:
        """A reader of one answer; None if the template knows no thoughts. begun: see `Tokenizer.thoughts`."""
        if not self._template.marks_thoughts:
            return None
        if begun is not None:  # where an answer is continued, the template begins no thought
            reader = ThoughtReader()
            reader.push(begun)
            return reader
        if thinking not in self._opened:
            self._opened[thinking] = self._opens_thought(thinking)
        return ThoughtReader(self._opened[thinking])

    def _opens_thought(self, thinking: bool | None) -> bool:
        """Whether the template itself begins the thought of an answer."""
        try:
            asked = self._template.render([{"role": "user", "content": _PROBE}], True, None, thinking)
        except TokenizerError:
            return False
        _, _, begun = asked.rpartition(_PROBE)
        return begun.rfind(OPEN) > begun.rfind(CLOSE)

    def _probe(self, roles: Sequence[str]) -> str:
        """A conversation of messages with an odd content; empty if the template refuses it, which it may."""
        try:
            return self._template.render([{"role": role, "content": _PROBE} for role in roles], False)
        except TemplateLimit:
            raise
        except TokenizerError:
            return ""

    def _find_end_of_turn(self, controls: Mapping[str, int]) -> int | None:
        """The control token that the template puts after an answer: the model was trained to end with it."""
        _, answer, rest = self._probe(_TURNS[:2]).rpartition(_PROBE)
        ends = [text for text in controls if answer and text and rest.lstrip().startswith(text)]
        return controls[max(ends, key=len)] if ends else None


def _reads_like_a_marker(text: str) -> bool:
    """Whether a text is more than a word, a sign or white space, which vocabularies add as tokens as well."""
    return any(c.isalnum() for c in text) and any(not c.isalnum() and not c.isspace() for c in text)


def same_tokens(ids: Sequence[int], text: str, stream: "StreamDecoder") -> tuple[int, int]:
    """How many of the ids, from the first on, make a beginning of `text`, and the length of that."""
    decoded, count, length = 0, 0, 0
    for n, i in enumerate(ids, 1):
        piece = stream.push(i)
        if not text.startswith(piece, decoded):
            return count, length
        decoded += len(piece)
        if not stream.pending:
            count, length = n, decoded
    rest = stream.finish()
    return (len(ids), decoded + len(rest)) if text.startswith(rest, decoded) else (count, length)
