"""The form of answers in /v1/responses: a response whose items are a message, or calls of functions; and its events."""

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from bitnet_numba.engine.completion import Completion
from bitnet_numba.engine.request import Request
from bitnet_numba.sampling import TokenLogprob
from bitnet_numba.sampling_params import SamplingParams
from bitnet_numba.server.generation import usage
from bitnet_numba.server.schemas import ResponseBody
from bitnet_numba.server.tool_calls import CallPart, CallReader

Item = dict[str, Any]


class ResponseForm:
    """An answer as a response, or as the events of one. There is one answer, with index 0."""

    def __init__(
        self, request_id: str, model: str, body: ResponseBody, params: SamplingParams, tags: tuple[str, str] | None
    ):
        """tags: what stands before and after a call of a function; None: the answer is a text."""
        self._message_id, self._number = f"msg_{request_id}", 0  # the number of the next event
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
            for part in self._reader.push(completions[0].text)[1]:
                self._note(part)
        return self._response(completions[0])

    def opening(self, index: int, request: Request, prompt_logprobs: Sequence[TokenLogprob | None]) -> str:
        """The response begins, and a text with it."""
        begun = {**self._base, "status": "in_progress", "incomplete_details": None, "output": [], "usage": None}
        events = self._event("response.created", {"response": begun})
        events += self._event("response.in_progress", {"response": begun})
        return events + (self._begin_message() if self._reader is None else "")

    def text(self, index: int, text: str, logprobs: Sequence[TokenLogprob]) -> str:
        """More text, or more of calls."""
        if self._reader is None:
            return self._more(text)
        text, parts = self._reader.push(text)
        return (self._more(text) if text else "") + "".join(map(self._more_of_call, parts))

    def finish(self, index: int, completion: Completion) -> str:
        """Ends the item that is open, and the response."""
        rest = self._reader.finish() if self._reader is not None else ""
        if not self._calls and not self._message_begun:  # all of it, if it was cut before the name of its first call
            rest = completion.text
        events = self._more(rest) if rest else ""
        if self._calls:
            events += self._end_call("completed" if completion.finish_reason == "stop" else "incomplete")
        elif not self._message_begun:  # an answer without text
            events += self._begin_message()
        whole = self._response(completion)
        if not self._calls:
            place, text = self._place(), completion.text
            events += (
                self._event("response.output_text.done", {**place, "text": text, "logprobs": []})
                + self._event("response.content_part.done", {**place, "part": _part(text)})
                + self._event("response.output_item.done", {"output_index": 0, "item": whole["output"][0]})
            )
        return events + self._event(f"response.{whole['status']}", {"response": whole})

    def closing(self, completions: Sequence[Completion], n: int) -> str:
        """Nothing: the event of `finish` was the last one."""
        return ""

    def _response(self, completion: Completion) -> dict[str, Any]:
        """The response with the calls that have been noted, or else with the text."""
        status = "completed" if completion.finish_reason == "stop" else "incomplete"
        if self._calls:
            self._calls[-1]["status"] = status
        counts = usage([completion], 1)
        return {
            **self._base,
            "status": status,
            "incomplete_details": None if status == "completed" else {"reason": "max_output_tokens"},
            "output": self._calls or [self._message(completion.text, status)],
            "usage": {
                "input_tokens": counts["prompt_tokens"],
                "input_tokens_details": {**counts["prompt_tokens_details"], "cache_write_tokens": 0},
                "output_tokens": counts["completion_tokens"],
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": counts["total_tokens"],
            },
        }

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
            events += self._end_call("completed") if self._calls else ""
            item = {**self._note(part._replace(arguments="")), "status": "in_progress"}
            events += self._event("response.output_item.added", {"output_index": part.number, "item": item})
            part = part._replace(name=None)
        call = self._note(part)
        if part.arguments:
            said = {"item_id": call["id"], "output_index": part.number, "delta": part.arguments}
            events += self._event("response.function_call_arguments.delta", said)
        return events

    def _end_call(self, status: str) -> str:
        """The last call ends."""
        call, number = self._calls[-1], len(self._calls) - 1
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
        return self._event(
            "response.output_item.added", {"output_index": 0, "item": self._message(None, "in_progress")}
        ) + self._event("response.content_part.added", {**self._place(), "part": _part("")})

    def _event(self, kind: str, content: Mapping[str, Any]) -> str:
        data = {"type": kind, "sequence_number": self._number, **content}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(data)}\n\n"

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._message_id, "output_index": 0, "content_index": 0}

    def _message(self, text: str | None, status: str) -> Item:
        content = [] if text is None else [_part(text)]
        return {"id": self._message_id, "type": "message", "role": "assistant", "status": status, "content": content}


def _part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
