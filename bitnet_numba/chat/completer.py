"""The menu that opens while a command is typed: commands, settings and paths, with what they mean."""

from collections.abc import Iterable, Mapping, Sequence

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from bitnet_numba.chat.chat_commands import Command


class CommandCompleter(Completer):
    """Completes a line that begins with a slash."""

    def __init__(self, commands: Sequence[Command], settings: Mapping[str, str]):
        """settings: names and meanings of what /set changes."""
        self._commands, self._settings = commands, settings
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        if not text.startswith("/") or "\n" in text:
            return
        word, space, argument = text.partition(" ")
        if not space:
            for command in self._commands:
                names = [command.name, *(alias for alias in command.aliases if len(word) > 1)]
                for name in names:
                    if name.startswith(word.lower()):
                        display = f"{name} {command.argument}".rstrip()
                        yield Completion(name, -len(word), display, command.description)
                        break
            return
        command = next((c for c in self._commands if word.lower() in (c.name, *c.aliases)), None)  # type: ignore
        if command is None:
            return
        if command.argument == "FILE":
            yield from self._paths.get_completions(Document(argument.lstrip()), complete_event)
        elif command.name == "/set" and " " not in argument:
            for name, meaning in self._settings.items():
                if name.startswith(argument.lower()):
                    yield Completion(name, -len(argument), name, meaning)
