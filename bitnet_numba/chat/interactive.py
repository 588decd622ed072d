"""The interactive chat: line editing, commands and streamed answers."""

import sys
from collections.abc import Callable
from pathlib import Path

from prompt_toolkit.formatted_text import FormattedText
from rich.console import Console
from rich.text import Text

from bitnet_numba.chat.conversation import NO_TEMPLATE, Conversation, describe, sampling_line
from bitnet_numba.chat.line_editor import open_line_editor
from bitnet_numba.chat.saved import file_path, well_formed
from bitnet_numba.chat.terminal import WordWrap, clean, interruptible, silent_keyboard
from bitnet_numba.errors import BitNetError, ContextFull, one_line, printable

COMMANDS = {
    "/reset": "start over",
    "/undo": "remove the last question and answer",
    "/system [TEXT]": "show or set the system message; - removes it",
    "/save FILE": "write the conversation to a file",
    "/load FILE": "continue a conversation from a file",
    "/stats": "speed, context and memory of the last answer",
    "/help": "show this list",
    "/exit": "leave (also Ctrl-D)",
}
TURN_COMMANDS = ("/reset", "/undo", "/system", "/save", "/load")
EXAMPLES = ("Tell me a story about a dog and a kite.", "Where did they go?", "What can you do?")
MAX_WIDTH = 100  # columns; longer lines are hard to read


class Terminal:
    """Shows a conversation and carries out its commands."""

    def __init__(self, conversation: Conversation, show_stats: bool):
        self.conversation = conversation
        self.show_stats = show_stats
        self.console = Console(highlight=False)
        self.commands: dict[str, Callable[[str], None]] = {
            "/reset": self.reset,
            "/undo": self.undo,
            "/system": self.system,
            "/save": self.save,
            "/load": self.load,
            "/stats": self.stats,
            "/help": self.help,
        }

    def note(self, text: str, style: str = "dim") -> None:
        """Prints a line of the program, in another style than the model's text."""
        self.console.print(Text(clean(text), style))

    def greet(self, name: str | None) -> None:
        """Prints the model, the backend and a few hints."""
        engine = self.conversation.engine
        title = "the built-in model" if name is None else Path(name).resolve().name
        self.console.print(Text.assemble(("bitnet_numba", "bold cyan"), f"  {printable(title)}"))
        self.note(f"{engine.backend} backend, context of {engine.context:,} tokens")
        if self.conversation.raw:
            self.note("--raw: the model continues each text on its own")
        elif not engine.tokenizer.has_chat_template:
            self.note(NO_TEMPLATE)
        self.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
        if name is None and not self.conversation.raw:
            self.console.print("\nTry, for example:")
            for example in EXAMPLES:
                self.console.print(Text(f"  {example}", "cyan"))

    def handle(self, line: str) -> bool:
        """Runs a command or answers a question; returns False to leave."""
        if not line.strip():
            return True
        word, rest = line, ""
        if line.startswith("/"):
            word, rest = (*line.split(None, 1), "")[:2]
            word, rest = word.lower(), rest.strip()
        try:
            if word in ("/exit", "/quit"):
                return False
            if not word.startswith("/"):
                self.answer(line)
            elif rest and word in COMMANDS:  # a key without a placeholder takes no argument
                self.note(f"{word} takes no argument: nothing was done")
            elif self.conversation.raw and word in TURN_COMMANDS:
                self.note(f"{word} is not available with --raw: there are no turns")
            elif word in self.commands:
                self.commands[word](rest)
            else:
                self.note(f"unknown command {printable(word, 40)}; /help lists them (a leading space sends the line)")
        except ContextFull as error:
            self.note(f"{error}: nothing was sent", "yellow")
            self.advise()
        except BitNetError as error:
            self.note(str(error), "red")
        except Exception as error:  # whatever it is, the conversation outlives it
            self.note(f"failed: {type(error).__name__}: {one_line(error)}", "red")
        return True

    def answer(self, text: str) -> None:
        """Streams the answer. Ctrl-C stops it after the current token, a second Ctrl-C at once."""
        width = min(self.console.width, MAX_WIDTH)
        wrap, shown = WordWrap(width), False
        waiting = self.console.status("", spinner="dots")

        def told() -> None:
            if not shown:
                waiting.update("stopping after this part of the prompt; Ctrl-C again stops at once")

        with silent_keyboard(), interruptible(told) as interrupted:
            pieces = self.conversation.ask(text)
            waiting.start()
            try:
                for piece in pieces:
                    if piece:
                        waiting.stop()
                        shown = True
                        self.write(wrap.push(clean(piece)))
                    if interrupted:
                        break
            except KeyboardInterrupt:
                interrupted.append(True)
            finally:
                waiting.stop()
                pieces.close()  # type: ignore[attr-defined]
                if shown:
                    self.write(wrap.finish() + "\n")
        last = self.conversation.last
        if interrupted:
            self.note("[stopped]" if shown else "[stopped before the answer began: the question is forgotten]")
        elif last is not None and last.finish_reason == "length":
            self.note(f"[cut after {self.conversation.params.max_new_tokens:,} tokens: see --max-new-tokens]")
        elif last is not None and last.finish_reason == "context":
            self.note("[cut: the context is full]", "yellow")
            self.advise()
        if self.show_stats and last is not None:
            self.note(describe(last, self.conversation))

    def write(self, text: str) -> None:
        """Prints the model's text, unstyled."""
        sys.stdout.write(text)
        sys.stdout.flush()

    def advise(self) -> None:
        """Prints what can be done about a full context."""
        if self.conversation.raw:
            advice = "give a shorter text"
        else:
            advice = "/undo removes the last question and answer, /reset starts over"
        engine = self.conversation.engine
        larger = "; or restart with a larger --context" if engine.context < engine.config.max_context else ""
        self.note(advice + larger, "yellow")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        self.note("a new conversation")

    def undo(self, _: str) -> None:
        text = self.conversation.undo()
        self.note("there is nothing to remove" if text is None else f"removed: {printable(text)}")

    def system(self, text: str) -> None:
        if text:
            self.conversation.system = "" if text == "-" else well_formed(text)
        system = self.conversation.system
        self.note(f"system message: {system}" if system else "no system message")

    def save(self, name: str) -> None:
        if not self.conversation.messages:
            self.note("there is nothing to save yet")  # and an earlier conversation in the file stays
        elif self.named(name):
            self.conversation.save(file_path(name))
            self.note(f"saved {len(self.conversation.messages)} messages to {printable(name)}")

    def load(self, name: str) -> None:
        if self.named(name):
            self.conversation.load(file_path(name))
            for message in self.conversation.messages:
                is_user = message["role"] == "user"
                text = clean(message["content"])
                self.console.print(Text(f"> {text}", "bold cyan") if is_user else Text(text))
            self.note(f"loaded {len(self.conversation.messages)} messages from {printable(name)}")

    def named(self, name: str) -> bool:
        if not name:
            self.note("give a file name, such as chat.json")
        return bool(name)

    def stats(self, _: str) -> None:
        last = self.conversation.last
        self.note("no answer yet" if last is None else describe(last, self.conversation))

    def help(self, _: str) -> None:
        for command, meaning in COMMANDS.items():
            self.console.print(Text.assemble((f"  {command:<16}", "cyan"), meaning))
        self.note(f"  answers: {sampling_line(self.conversation.params)}")
        self.note("  Alt-Enter starts a new line, Up and Down recall earlier input")


def converse(conversation: Conversation, name: str | None, show_stats: bool) -> None:
    """Runs the conversation until Ctrl-D or /exit. `name`: the checkpoint's; None for the built-in model."""
    terminal = Terminal(conversation, show_stats)
    terminal.greet(name)
    editor = open_line_editor(command.split()[0] for command in COMMANDS)
    message = FormattedText([("bold ansicyan", "> ")])
    while True:
        try:
            print()
            line = editor.prompt(message)
        except KeyboardInterrupt:  # Ctrl-C drops the line that is being typed
            if not editor.default_buffer.text:
                terminal.note("Ctrl-D or /exit leaves")
            continue
        except (EOFError, OSError):
            return  # Ctrl-D, or the terminal is gone
        try:
            if not terminal.handle(line):
                return
        except KeyboardInterrupt:
            continue
        except OSError:
            return  # the terminal is gone
