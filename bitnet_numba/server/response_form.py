"""The form of answers in /v1/responses: a response whose items are a thought, if there is one, and a message, or calls
of functions; and its events."""

import json
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.generation import usage
from bitnet_numba.server.schemas import ResponseBody
from bitnet_numba.server.tool_calls import CallPart, CallReader
from bitnet_numba.text.thoughts import ThoughtReader, read_thought
from bitnet_numba.text.tokenizer import Tokenizer

Item = dict[str, Any]


class ResponseForm:
    """An answer as a response, or as the events of one. There is one answer, with index 0."""

    def __init__(
        self,
        request_id: str,
        model: str,
        body: ResponseBody,
        params: SamplingParams,
        tags: tuple[str, str] | None,
        tokenizer: Tokenizer,
        new_thoughts: Callable[[], ThoughtReader | None],
    ):
        """tags: what stands before and after a call of a function; None: the answer is a text. new_thoughts: makes what
        tells the thought of an answer apart, if there may be one."""
        self._tokenizer, self._new_thoughts = tokenizer, new_thoughts
        self._thoughts: ThoughtReader | None = None  # of a stream
        self._thought, self._thought_ended = "", False  # as far as a stream has come
        self._thought_id, self._message_id = f"rs_{request_id}", f"msg_{request_id}"
        self._number = 0  # of the next event
        self._reader = None if tags is None else CallReader(tags)
        self._message_begun = False  # of a stream
        self._calls: list[Item] = []
        format = body.text.format if body.text is not None else None
        text_format = {"type": "text"} if format is None else format.model_dump(by_alias=True, exclude_none=True)
        choice = body.tool_choice or "auto"
        self._base = {
            "id": f"resp_{request_id}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": params.temperature,
            "text": {"format": text_format},
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [{"strict": False, **tool.model_dump(exclude_none=True)} for tool in body.tools or ()],
            "top_p": params.top_p,
            "truncation": body.truncation or "disabled",
        }

    def whole(self, requests: Sequence[Request], completions: Sequence[Completion], n: int) -> dict[str, Any]:
        """A response."""
        if self._reader is not None:
            for part in self._reader.push(self._split(completions[0])[1])[1]:
                self._note(part)
        return self._response(completions[0])

    def _split(self, completion: Completion) -> tuple[str, str]:
        """The thought and the answer of a text."""
        return read_thought(self._new_thoughts(), completion.text)

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The response begins, and a text with it, if nothing else can come first."""
        self._thoughts = self._new_thoughts()
        begun = {**self._base, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        events = self._event("response.created", {"response": begun})
        events += self._event("response.in_progress", {"response": begun})
        return events + (self._begin_message() if self._reader is None and self._thoughts is None else "")

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More of a thought, of text, or of calls."""
        thought, text = ("", text) if self._thoughts is None else self._thoughts.push(text)
        return self._more_of_both(thought, text)

    def _more_of_both(self, thought: str, text: str) -> str:
        events = self._more_of_thought(thought) if thought else ""
        if not text:
            return events
        if self._reader is None:
            return events + self._more(text)
        text, parts = self._reader.push(text)
        return events + (self._more(text) if text else "") + "".join(map(self._more_of_call, parts))

    def finish(self, index: int, completion: Completion) -> str:
        """Ends the item that is open, and the response."""
        events = "" if self._thoughts is None else self._more_of_both(*self._thoughts.finish())
        rest = self._reader.finish() if self._reader is not None else ""
        text = self._split(completion)[1]
        if not self._calls and not self._message_begun:  # all of it, if it was cut before the name of its first call
            rest = text
        events += self._more(rest) if rest else ""
        whole = self._response(completion)
        if self._calls:
            events += self._end_call(whole["status"])
        elif whole["output"][-1]["type"] == "message":
            events += "" if self._message_begun else self._begin_message()  # an answer without text
            place, item = self._place(), {"output_index": self._first, "item": whole["output"][-1]}
            events += (
                self._event("response.output_text.done", {**place, "text": text, "logprobs": []})
                + self._event("response.content_part.done", {**place, "part": _part(text)})
                + self._event("response.output_item.done", item)
            )
        else:
            events += self._end_thought(whole["status"])
        return events + self._event(f"response.{whole['status']}", {"response": whole})

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """Nothing: the event of `finish` was the last one."""
        return ""

    def _response(self, completion: Completion) -> dict[str, Any]:
        """The response with its thought, and the calls that have been noted, or else the text; without a text if the
        answer was cut amid its thought."""
        thought, text = self._split(completion)
        status = "completed" if completion.finish_reason == "stop" else "incomplete"
        cut = thought != "" and not text and not self._calls and status == "incomplete"
        output = [self._reasoning(thought, status if cut else "completed")] if thought else []
        output += self._calls or ([] if cut else [self._message(text, status)])
        if self._calls:
            self._calls[-1]["status"] = status
        counts = usage([completion], 1)
        return {
            **self._base,
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": output,
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": self._thought_tokens(completion) if thought else 0},
                "total_tokens": counts["total_tokens"],
            },
        }

    def _thought_tokens(self, completion: Completion) -> int:
        """How many tokens of an answer that thinks are its thought, with what ends it."""
        ids = completion.token_ids

        def is_over(count: int) -> bool:
            thoughts = self._new_thoughts()
            assert thoughts is not None  # else there would be no thought
            thoughts.push(self._tokenizer.decode(ids[:count]))
            return thoughts.answering

        return bisect_left(range(len(ids)), True, key=is_over)

    def _note(self, part: CallPart) -> Item:
        """Adds a part to the call that it belongs to."""
        if part.name is not None:
            ids = {"id": f"fc_{part.id.removeprefix('call_')}", "call_id": part.id}
            self._calls.append(
                {**ids, "type": "function_call", "status": "completed", "name": part.name, "arguments": ""}
            )
        self._calls[-1]["arguments"] += part.arguments
        return self._calls[-1]

    def _more_of_call(self, part: CallPart) -> str:
        events = ""
        if part.name is not None:
            events += self._end_call("completed") if self._calls else self._end_thought("completed")
            item = {**self._note(part._replace(arguments="")), "status": "in_progress"}
            events += self._event(
                "response.output_item.added", {"output_index": self._first + part.number, "item": item}
            )
            part = part._replace(name=None)
        call = self._note(part)
        if part.arguments:
            said = {"item_id": call["id"], "output_index": self._first + part.number, "delta": part.arguments}
            events += self._event("response.function_call_arguments.delta", said)
        return events

    def _end_call(self, status: str) -> str:
        """The last call ends."""
        call, number = self._calls[-1], self._first + len(self._calls) - 1
        call["status"] = status
        said = {"item_id": call["id"], "output_index": number, "name": call["name"], "arguments": call["arguments"]}
        return self._event("response.function_call_arguments.done", said) + self._event(
            "response.output_item.done", {"output_index": number, "item": call}
        )

    def _more(self, text: str) -> str:
        """More text, in a message that begins with it if there is none yet."""
        begun = "" if self._message_begun else self._begin_message()
        return begun + self._event("response.output_text.delta", {**self._place(), "delta": text, "logprobs": []})

    def _begin_message(self) -> str:
        self._message_begun = True
        item = {"output_index": self._first, "item": self._message(None, "in_progress")}
        return (
            self._end_thought("completed")
            + self._event("response.output_item.added", item)
            + self._event("response.content_part.added", {**self._place(), "part": _part("")})
        )

    def _more_of_thought(self, text: str) -> str:
        """More of the thought, in an item that begins with it if there is none yet."""
        events, place = "", self._thought_place()
        if not self._thought:
            item = {**self._reasoning("", "in_progress"), "content": []}
            events += self._event("response.output_item.added", {"output_index": 0, "item": item})
            events += self._event("response.content_part.added", {**place, "part": _thought_part("")})
        self._thought += text
        return events + self._event("response.reasoning_text.delta", {**place, "delta": text})

    def _end_thought(self, status: str) -> str:
        """The thought ends, if there is one and it has not ended."""
        if not self._thought or self._thought_ended:
            return ""
        self._thought_ended, place, text = True, self._thought_place(), self._thought
        return (
            self._event("response.reasoning_text.done", {**place, "text": text})
            + self._event("response.content_part.done", {**place, "part": _thought_part(text)})
            + self._event("response.output_item.done", {"output_index": 0, "item": self._reasoning(text, status)})
        )

    @property
    def _first(self) -> int:
        """The index of the item after the thought."""
        return 1 if self._thought else 0

    def _event(self, kind: str, content: Mapping[str, Any]) -> str:
        data = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": self._first, "content_index": 0}

    def _thought_place(self) -> dict[str, Any]:
        return {"item_id": self._thought_id, "output_index": 0, "content_index": 0}

    def _reasoning(self, thought: str, status: str) -> Item:
        content = [_thought_part(thought)]
        return {"id": self._thought_id, "type": "reasoning", "summary": [], "content": content, "status": status}

    def _message(self, text: str | None, status: str) -> Item:
        content = [] if text is None else [_part(text)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _thought_part(text: str) -> dict[str, Any]:
    return {"type": "reasoning_text", "text": text}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
