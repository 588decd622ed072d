"""Chat templates: turn a list of messages into the text format a model was trained on, in Jinja's sandbox.

A template comes with the model and is not trusted. It sees only what Hugging Face's templates expect.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from threading import Lock
from typing import Any, NoReturn

from jinja2 import TemplateError

from bitnet_numba.errors import RequestError, TokenizerError, one_line
from bitnet_numba.model_folder import ModelFolder
from bitnet_numba.text.template_sandbox import BoundedSandbox, size_of

Message = Mapping[str, Any]  # {"role": str, "content": str}; an assistant's may hold "token_ids" as well

# 2B4T's: "Role: content<|eot_id|>" for each message, then "Assistant: ".
BITNET_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
# For models without a chat template: a transcript that a plain language model continues well.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] | trim }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
MAX_DATE_FORMAT = 100  # characters
PLAIN_STOP = "\nUser:"  # where such a model starts to write the user's next turn


class ChatTemplate:
    """A compiled template. Raises TokenizerError if it is not valid Jinja."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]):
        self.source = source
        self._special_tokens = dict(special_tokens)  # bos_token, eos_token, ...
        # The two functions that Hugging Face gives to templates.
        functions = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        self._sandbox = BoundedSandbox()
        self._sandbox.globals.update(functions)
        self._lock = Lock()  # the sandbox keeps its budget for one rendering at a time
        try:
            self._template = self._sandbox.compile_bounded(source)
        except Exception as error:  # compiling evaluates constants, so a template can raise nearly anything
            raise TokenizerError(f"chat template: {one_line(error)}") from None

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The conversation as text. Raises TokenizerError if the template fails or violates the sandbox."""
        check_messages(messages)
        shown = [{key: message[key] for key in message if key != "token_ids"} for message in messages]
        try:
            with self._lock:
                self._sandbox.begin(size_of(messages))
                return self._template.render(
                    messages=shown,
                    add_generation_prompt=add_generation_prompt,
                    tools=None,
                    documents=None,
                    **self._special_tokens,
                )
        except Exception as error:  # whatever it is, the template caused it
            raise TokenizerError(f"chat template: {one_line(error)}") from None


def find_template(folder: ModelFolder, tokenizer_config: Mapping[str, Any]) -> str | None:
    """A folder's chat template: chat_template.jinja, otherwise the one in tokenizer_config.json, otherwise None.

    tokenizer_config.json may hold one template, or several by name; then "default" is used.
    """
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TokenizerError(f"{file} cannot be read: {one_line(error)}") from None
    value = tokenizer_config.get("chat_template")
    if isinstance(value, list) and all(isinstance(entry, dict) for entry in value):
        value = {entry.get("name"): entry.get("template") for entry in value}
    if isinstance(value, dict):
        value = value.get("default")
        if value is None:
            raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template has no template named default")
    if value is not None and not isinstance(value, str):
        raise TokenizerError(f"{folder / 'tokenizer_config.json'}: chat_template is not a string")
    return value


def check_messages(messages: Sequence[Message]) -> None:
    """Raises RequestError unless there is a message and each has a role and a content, both strings."""
    if not messages:
        raise RequestError("the conversation has no messages")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise RequestError("each message needs a role and a content, both strings")


def _strftime_now(form: str) -> str:
    if len(form) > MAX_DATE_FORMAT or re.search(r"\d{3}", form):
        raise TemplateError("such a long date format is not allowed")
    return datetime.now().strftime(form)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)
