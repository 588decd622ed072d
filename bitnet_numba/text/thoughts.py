"""Thoughts: what some models write between <think> and </think> before they answer."""

from bitnet_numba.errors import RequestError, shown

OPEN, CLOSE = "<think>", "</think>"
_SPACE = r"/[\s\x1c-\x1f]*/"  # what `str.strip` takes away


class ThoughtReader:
    """Tells the thought of an answer from the answer, as the text arrives. White space between them is dropped."""

    def __init__(self, opened: bool = False):
        """opened: the prompt has begun the thought, so the text comes without its tag."""
        self._where = "thought" if opened else "start"
        self._held = ""  # what has arrived and may yet be a tag, or white space around one
        self._spaces: list[str] = []  # white space that has arrived after that
        self._first = True  # whether nothing visible of the present part has come

    @property
    def thinking(self) -> bool:
        """Whether the thought has begun, and not ended."""
        return self._where == "thought"

    @property
    def answering(self) -> bool:
        """Whether the thought has ended, or there is none."""
        return self._where == "answer"

    @property
    def terminal(self) -> str | None:
        """What is to come of the thought, with its tags and the white space around them; None if the answer has begun.

        In Lark's notation, as llguidance reads it.
        """
        if self._where == "answer":
            return _SPACE if self._first else None
        begin = "" if self.thinking else f'{_SPACE} "{OPEN}" '
        return f'{begin}(/(?s:.*)/ & ~(/(?s:.*)/ "{CLOSE}" /(?s:.*)/)) "{CLOSE}" {_SPACE}'

    def push(self, text: str) -> tuple[str, str]:
        """What follows of the thought, and of the answer."""
        if self._where != "answer" and text.isspace():  # not looked at each time: there may be any length of it
            self._spaces.append(text)
            return "", ""
        self._hold(text)
        if self._where == "start":
            begun = self._held.lstrip()
            if len(begun) < len(OPEN) and OPEN.startswith(begun):
                return "", ""
            if begun.startswith(OPEN):
                self._where, self._held = "thought", begun[len(OPEN) :]
            else:
                self._where, self._first = "answer", False
        thought = self._read_thought() if self._where == "thought" else ""
        return thought, self._read(self._held) if self._where == "answer" else ""

    def finish(self) -> tuple[str, str]:
        """The rest of both, at the end of the text."""
        self._hold("")
        rest, self._held = self._held, ""
        if self._where == "thought":
            return (rest.strip() if self._first else rest.rstrip()), ""
        return "", rest if self._where == "start" else ""

    def _hold(self, text: str) -> None:
        self._held = "".join([self._held, *self._spaces, text])
        self._spaces.clear()

    def _read_thought(self) -> str:
        thought, end, rest = self._held.partition(CLOSE)
        if end:
            thought = thought.strip() if self._first else thought.rstrip()
            self._where, self._held, self._first = "answer", rest, True
            return thought
        held = next(n for n in range(len(CLOSE) - 1, -1, -1) if thought.endswith(CLOSE[:n]))
        return self._read(thought[: len(thought) - held].rstrip())

    def _read(self, text: str) -> str:
        """Takes the beginning of what is held, without white space before the first visible character."""
        self._held = self._held[len(text) :]
        if self._first:
            text = text.lstrip()
            self._first = not text
        return text


def check_thoughts(thinking: object, begun: object) -> None:
    """Raises RequestError unless they are a switch and a text, or None."""
    if not isinstance(thinking, bool | None):
        raise RequestError(f"thinking must be True, False or None, not {shown(thinking)}")
    if not isinstance(begun, str | None):
        raise RequestError(f"begun must be the text of an answer, or None, not {shown(begun)}")


def split_thought(text: str) -> tuple[str, str]:
    """The thought and the answer in the text of a completion; "" for a thought that is not there.

    A thought without an end, for the answer was cut, is one if its tag stands at the beginning of the text; where the
    prompt has begun the thought, the text has only the tag at its end.

    Raises RequestError if `text` is not a string.
    """
    if not isinstance(text, str):
        raise RequestError(f"split_thought takes the text of an answer, not {shown(text)}")
    return read_thought(ThoughtReader(opened=CLOSE in text and OPEN not in text.partition(CLOSE)[0]), text)


def read_thought(reader: ThoughtReader | None, text: str) -> tuple[str, str]:
    """The thought and the answer of a whole text, by a new reader; None: there is no thought."""
    if reader is None:
        return "", text
    pieces = reader.push(text), reader.finish()
    thought, answer = ("".join(parts) for parts in zip(*pieces, strict=True))
    return thought, answer
