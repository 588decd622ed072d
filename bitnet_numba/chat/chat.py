"""The interactive chat's state, and what it does for an answer."""

from collections.abc import Callable, Iterator

from bitnet_numba.chat.attachments import Attachment, with_attachments
from bitnet_numba.chat.conversation import Conversation
from bitnet_numba.chat.display import Display, show_answer
from bitnet_numba.chat.report import describe, forgotten, restart_advice
from bitnet_numba.errors import ContextFull


class Chat:
    """A conversation, where it is shown, and what waits for the next question."""

    def __init__(
        self, conversation: Conversation, display: Display, title: str = "the model", show_stats: bool = False
    ):
        self.conversation = conversation
        self.display = display
        self.title = title
        self.show_stats = show_stats
        self.attachments: list[Attachment] = []  # for the next question
        self.draft = ""  # what the next line begins with: the last question, which that line replaces
        self.note = display.note

    def ask(self, text: str, replacing: bool = False) -> None:
        """Answers a question, with the files that wait for it."""
        question = with_attachments(self.attachments, text)
        try:
            if self.answer(lambda: self.conversation.ask(question, replacing)):
                self.attachments.clear()
        except ContextFull:
            self.attachments.clear()  # or no other question would fit either
            raise

    def answer(self, start: Callable[[], Iterator[str]]) -> bool:
        """Shows an answer and what there is to say about it; returns False if it was stopped before it began.

        start: makes the pieces of the answer, or raises RequestError.
        """
        talk = self.conversation
        unread = talk.unread
        pieces = start()
        if talk.unread > unread:
            self.display.hint(forgotten((talk.unread - unread) // 2))
        any_text, stopped = show_answer(self.display, talk, pieces)
        last = talk.last
        if stopped:
            self.note("[stopped; /continue goes on]" if any_text else "[stopped before the answer began]")
        elif last is not None and last.finish_reason == "length":
            limit = f"{talk.params.max_new_tokens:,} tokens"
            self.note(f"[cut after {limit}: /continue goes on, /set length changes the limit]")
        elif last is not None and last.finish_reason == "context":
            self.note("[cut: the context is full]", "yellow")
            self.advise()
        if self.show_stats and last is not None:
            self.note(describe(last, talk))
        return any_text or not stopped

    def advise(self, refused: bool = False) -> None:
        """Prints what can be done about a full context. refused: it has no room for the question itself."""
        talk = self.conversation
        if talk.raw:
            advice = "give a shorter text"
        elif refused:  # the oldest exchanges were left out already
            advice = "ask something shorter" + (", or shorten the system message with /system" if talk.system else "")
        elif len(talk.messages) - talk.unread > 2:
            advice = "/continue goes on, without the oldest exchanges"
        else:
            advice = "/undo removes the last question and answer, /clear starts over"
        self.note(advice + restart_advice(talk), "yellow")
