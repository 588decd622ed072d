"""The interactive chat: what a line does, and the loop that reads lines."""

from collections.abc import Sequence
from pathlib import Path

from prompt_toolkit.formatted_text import FormattedText
from rich.text import Text

from bitnet_numba.chat.attachments import unquoted
from bitnet_numba.chat.chat import Chat
from bitnet_numba.chat.chat_commands import RAW_SETTINGS, SETTINGS, attach, did_you_mean, find_command, offered
from bitnet_numba.chat.completer import CommandCompleter
from bitnet_numba.chat.conversation import NO_TEMPLATE
from bitnet_numba.chat.line_editor import open_line_editor
from bitnet_numba.errors import BitNetError, ContextFull, one_line, printable

EXAMPLES = ("Tell me a story about a dog and a kite.", "Where did they go?", "What can you do?")


def greet(chat: Chat, built_in: bool) -> None:
    """Prints the model, the backend and a few hints."""
    if chat.display.quiet:
        return
    raw, engine = chat.conversation.raw, chat.conversation.engine
    console = chat.display.console
    console.print(Text.assemble(("bitnet_numba", "bold cyan"), f"  {printable(chat.title)}"))
    chat.note(f"{engine.backend} backend, context of {engine.context:,} tokens")
    if raw:
        chat.note("--raw: the model continues each text on its own")
    elif not engine.tokenizer.has_chat_template:
        chat.note(NO_TEMPLATE)
    chat.note("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    if built_in and not raw:
        console.print("\nTry, for example:")
        for example in EXAMPLES:
            console.print(Text(f"  {example}", "cyan"))


def title_of(checkpoint: str | None) -> str:
    """What a model is called on the screen."""
    return "the built-in model" if checkpoint is None else Path(checkpoint).resolve().name


def handle(chat: Chat, line: str) -> bool:
    """Runs a command or answers a question; returns False to leave."""
    replacing, chat.draft = bool(chat.draft), ""
    if not line.strip():
        return True
    word, argument = line.strip(), ""
    if line.startswith("/"):
        word, argument = (*line.split(None, 1), "")[:2]
    command = find_command(word)
    try:
        if command is None and not line.startswith("/"):
            chat.ask(unquoted(line), replacing)
        elif command is None:
            names = [name for known in offered(chat.conversation.raw) for name in (known.name, *known.aliases)]
            advice = did_you_mean(word, names) or "/help lists the commands (a leading space sends the line)"
            chat.note(f"unknown command {printable(word, 40)}; {advice}")
        elif argument.strip() and not command.argument:
            chat.note(f"{word} takes no argument: nothing was done")
        elif command.run is None:
            return False
        elif command.turns and chat.conversation.raw:
            chat.note(f"{command.name} is not available with --raw: there are no turns")
        else:
            command.run(chat, unquoted(argument).strip())
    except ContextFull as error:
        chat.note(f"{error}: nothing was sent", "yellow")
        chat.advise(refused=command is None)
    except BitNetError as error:
        chat.note(str(error), "red")
    except Exception as error:  # whatever it is, the conversation outlives it
        chat.note(f"failed: {type(error).__name__}: {one_line(error)}", "red")
    return True


def converse(chat: Chat, built_in: bool, files: Sequence[str] = ()) -> None:
    """Runs the conversation until Ctrl-D or /exit. files: what /file gets first; RequestError if that fails."""
    greet(chat, built_in)
    for name in files:
        attach(chat, name)
    raw = chat.conversation.raw
    editor = open_line_editor(CommandCompleter(offered(raw), RAW_SETTINGS if raw else SETTINGS))
    while True:
        try:
            print()
            line = editor.prompt(_prompt(chat), default=chat.draft)
        except KeyboardInterrupt:  # Ctrl-C drops the line that is being typed
            _drop_line(chat, editor.default_buffer.text)
            continue
        except (EOFError, OSError):
            return  # Ctrl-D, or the terminal is gone
        try:
            if not handle(chat, line):
                return
        except KeyboardInterrupt:
            continue
        except OSError:
            return  # the terminal is gone


def _prompt(chat: Chat) -> FormattedText:
    names = "".join(f"[{printable(attachment.name, 30)}] " for attachment in chat.attachments)
    return FormattedText([("ansicyan", names), ("bold ansicyan", "> ")])


def _drop_line(chat: Chat, text: str) -> None:
    chat.draft = ""
    if text:
        return
    if chat.attachments:
        chat.attachments.clear()
        chat.note("the files do not go with the next question any more")
    else:
        chat.note("Ctrl-D or /exit leaves")
