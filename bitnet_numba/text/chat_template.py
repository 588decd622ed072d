"""Chat templates: the text format that a model was trained on, as Jinja; where folders keep them, who renders them.

A template comes with the model and is not trusted: it is rendered by a process of its own.
"""

import functools
import json
import operator
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bitnet_numba.errors import RequestError, TokenizerError, one_line, printable
from bitnet_numba.model_folder import FileError, ModelFile, ModelFolder
from bitnet_numba.text import template_worker
from bitnet_numba.text.template_process import PROCESS
from bitnet_numba.text.thoughts import CLOSE, OPEN

ADDITIONAL = "additional_chat_templates"  # a folder in a model folder

# {"role": str, "content": str or text parts}; an assistant's may hold "token_ids" as well
Message = Mapping[str, Any]

# 2B4T's: "Role: content<|eot_id|>" for each message, then "Assistant: ".
BITNET_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# The same as published; the built-in model's.
PUBLISHED_BITNET_TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = message['role'] | capitalize"
    " + ': '+ message['content'] | trim + '<|eot_id|>' %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# For models without a chat template: a transcript that a plain language model continues well.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
PLAIN_STOP = "\nUser:"  # where such a model starts to write the user's next turn
TRUSTED = frozenset({BITNET_TEMPLATE, PUBLISHED_BITNET_TEMPLATE, PLAIN_TEMPLATE})  # rendered in this process

MAX_FILE = 10_000_000  # bytes
ROLES = ("system", "user", "assistant")  # any template may get these; others only if it names them


class ChatTemplate:
    """A compiled template. Raises TokenizerError if it is not valid Jinja."""

    def __init__(self, source: str, variables: Mapping[str, object]):
        """variables: what the template sees besides the messages: bos_token, eos_token, ..."""
        self.source = source
        self._variables = dict(variables)
        if source not in TRUSTED:
            PROCESS.render(source, None)

    def knows_role(self, role: str) -> bool:
        """Whether the template may get messages of this role: it names it, or any template does."""
        return role in ROLES or (role.isidentifier() and re.search(f"['\"]{role}['\"]", self.source) is not None)

    @property
    def takes_tools(self) -> bool:
        """Whether the template tells the model of the functions that it may call."""
        return re.search(r"\btools\b", self.source) is not None

    @property
    def switches_thinking(self) -> bool:
        """Whether the template can tell the model to think before it answers, or not to."""
        return re.search(r"\benable_thinking\b", self.source) is not None

    @property
    def marks_thoughts(self) -> bool:
        """Whether answers may begin with a thought between tags (see `thoughts`)."""
        return OPEN in self.source or CLOSE in self.source

    @functools.cached_property
    def part_separator(self) -> str:
        """What joins the text parts of a content: nothing if the template itself does so, otherwise a line end."""
        parts = [{"type": "text", "text": text} for text in "ab"]
        try:
            own = self.render([{"role": "user", "content": parts}])
            return "" if own == self.render([{"role": "user", "content": "ab"}]) else "\n"
        except TokenizerError:
            return "\n"

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
        thinking: bool | None = None,
    ) -> str:
        """The conversation as text. tools: as in OpenAI's interface, for templates that take them. thinking: for
        templates that have the switch; None: as they do without it.

        Raises TokenizerError if the template fails or takes too much time or memory.
        """
        variables = {
            "messages": [{key: message[key] for key in message if key != "token_ids"} for message in messages],
            "tools": tools,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
            **({} if thinking is None else {"enable_thinking": thinking}),
            **self._variables,
        }
        if self.source not in TRUSTED:
            return PROCESS.render(self.source, variables)
        try:
            return template_worker.render(self.source, variables)
        except Exception as error:
            raise TokenizerError(f"chat template: {one_line(error)}") from None


def find_template(folder: ModelFolder, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A folder's chat template: chat_template.jinja, otherwise the one in tokenizer_config.json, otherwise None.

    There may be several by name, in a list or an object or as additional_chat_templates/NAME.jinja; then "default" is
    used. Raises TokenizerError if there are templates, but none that can be used.
    """
    file = folder / "chat_template.jinja"
    additional = _additional_templates(folder)
    if not file.exists() and "default" in additional:
        file = additional["default"]
    if file.exists():
        try:
            text = file.read_text(encoding="utf-8")
        except (FileError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} cannot be read: {one_line(error)}") from None
        if len(text) > MAX_FILE:
            raise TokenizerError(f"{file} is larger than any chat template")
        return text
    where, value = folder / "tokenizer_config.json", tokenizer_config.get("chat_template")
    if isinstance(value, list):
        if not all(isinstance(entry, dict) and isinstance(entry.get("name"), str) for entry in value):
            raise TokenizerError(f"{where}: chat_template is not a list of templates with names")
        value = {entry["name"]: entry.get("template") for entry in value}
    if isinstance(value, dict) or (value is None and additional):
        names = [*(value or {}), *additional]
        if "default" not in names:
            raise TokenizerError(f"{where}: no chat template is named default, only {printable(', '.join(names))}")
        value = (value or {})["default"]
        if value is None:
            raise TokenizerError(f"{where}: the chat_template named default is empty")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{where}: chat_template is not a string")
    return value


def _additional_templates(folder: ModelFolder) -> dict[str, ModelFile]:
    """Files of additional_chat_templates by their names without ending."""
    place = (folder / ADDITIONAL).path
    try:
        names = sorted(name for name in os.listdir(place) if name.endswith(".jinja"))
    except OSError:  # there are none, as in most folders
        return {}
    return {name.removesuffix(".jinja"): folder / f"{ADDITIONAL}/{name}" for name in names}


def read_messages(messages: Sequence[Message], template: ChatTemplate) -> list[dict[str, Any]]:
    """Messages as a template gets them, each content one string without lone surrogates.

    Raises RequestError unless there is a message, and each has a role that the template knows and a content: a string
    or a list of text parts [{"type": "text", "text": ...}]. An assistant's content may be None, which is empty.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise RequestError("a conversation must be a list of messages, with at least one")
    read = []
    for number, message in enumerate(messages, 1):
        where = f"message {number} of the conversation"
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or "content" not in message:
            raise RequestError(f"{where} needs a role and a content")
        role, content = message["role"], message["content"]
        if not template.knows_role(role):
            raise RequestError(f"{where}: this model's chat template knows no role {printable(repr(role), 60)}")
        if content is None and role == "assistant":
            content = ""
        elif isinstance(content, Sequence) and not isinstance(content, str | bytes):
            content = template.part_separator.join(text_of(part, where) for part in content)
        elif not isinstance(content, str):
            raise RequestError(f"{where}: the content must be a string or a list of text parts")
        ids = read_ids(message["token_ids"], where) if message.get("token_ids") is not None else []
        given = {**{key: value for key, value in message.items() if key != "token_ids"}, "content": content}
        try:
            plain = json.loads(json.dumps(without_surrogates(given)))
        except (TypeError, ValueError, RecursionError):
            raise RequestError(f"{where} holds something that JSON cannot") from None
        read.append(plain | ({"token_ids": ids} if ids else {}))
    return read


def read_ids(ids: object, where: str) -> list[int]:
    """Token ids as a list of int; NumPy's integers are fine. Raises RequestError for anything else."""
    try:
        if isinstance(ids, str | bytes | bytearray | Mapping) or any(isinstance(i, bool) for i in ids):  # type: ignore
            raise TypeError
        return [operator.index(i) for i in ids]  # type: ignore[attr-defined]
    except TypeError:
        raise RequestError(f"{where}: token ids must be integers in a list") from None


def text_of(part: object, where: str) -> str:
    """The text of one part of a content. Raises RequestError for other parts."""
    if isinstance(part, str):
        return part
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str) or part.get("type", "text") != "text":
        raise RequestError(f"{where}: the parts of a content must be of type text")
    return str(part["text"])


def without_surrogates(value: Any) -> Any:
    """Replaces lone surrogates, which a terminal or a JSON file can produce, by U+FFFD: they have no UTF-8.

    In a string, or in all strings of lists and dictionaries.
    """
    return map_strings(value, lambda text: text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))


def map_strings(value: Any, change: Callable[[str], str]) -> Any:
    """The value with `change` applied to every string in its lists and dictionaries, keys among them."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {map_strings(key, change): map_strings(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(item, change) for item in value]
    return value
