"""The commands of the interactive chat: one table of names, arguments, descriptions and functions."""

from base64 import b64encode
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from rich.text import Text

from bitnet_numba.chat.attachments import read_attachment
from bitnet_numba.chat.chat import Chat
from bitnet_numba.chat.display import write
from bitnet_numba.chat.files import file_path, well_formed
from bitnet_numba.chat.options import ALIASES, OPTIONS, STOP, THINKING, changed, value_text
from bitnet_numba.chat.report import describe
from bitnet_numba.chat.terminal import clean
from bitnet_numba.errors import RequestError, printable, suggestion

SWITCHES = {"stats": "speed and memory after each answer", "markdown": "answers are rendered as Markdown"}
SETTINGS = {
    **{option.name: option.meaning for option in OPTIONS if option.name not in ALIASES.values()},
    "length": "maximum tokens per answer",
    "stop": STOP,
    "thinking": THINKING,
    **SWITCHES,
}
RAW_SETTINGS = {name: meaning for name, meaning in SETTINGS.items() if name not in ("markdown", "thinking")}
ON = {"on": True, "off": False}


@dataclass(frozen=True)
class Command:
    """`/NAME ARGUMENT`. run: gets the argument, stripped; None: it leaves the chat."""

    name: str
    argument: str  # in capitals; in brackets if it may be left out; "" if there is none
    description: str
    run: Callable[[Chat, str], None] | None
    aliases: tuple[str, ...] = ()
    turns: bool = False  # whether it makes sense only where there are turns of user and model

    @property
    def usage(self) -> str:
        return f"{self.name} {self.argument}".rstrip()


def go_on(chat: Chat, _: str) -> None:
    chat.answer(chat.conversation.go_on)


def regenerate(chat: Chat, _: str) -> None:
    chat.answer(chat.conversation.ask_again)


def retry(chat: Chat, _: str) -> None:
    if chat.conversation.params.temperature == 0:
        chat.note("with temperature 0, no seed changes the answer: see /set temperature")
    else:
        chat.answer(lambda: chat.conversation.ask_again(other_seed=True))


def edit(chat: Chat, _: str) -> None:
    question = chat.conversation.question
    if question is None:
        raise RequestError("there is no question yet")
    chat.draft = question


def undo(chat: Chat, _: str) -> None:
    text = chat.conversation.undo()
    chat.note("there is nothing to remove" if text is None else f"removed: {printable(text)}")


def clear(chat: Chat, _: str) -> None:
    chat.conversation.reset()
    chat.attachments.clear()
    chat.note("a new conversation")


def system(chat: Chat, text: str) -> None:
    if text:
        chat.conversation.system = "" if text == "-" else well_formed(text)
    message = chat.conversation.system
    chat.note(f"system message: {message}" if message else "no system message")


def set_option(chat: Chat, argument: str) -> None:
    talk = chat.conversation
    settings = RAW_SETTINGS if talk.raw else SETTINGS
    name, _, value = argument.replace("=", " ", 1).strip().partition(" ")
    name, value = name.lower().replace("_", "-"), value.strip()
    name = next((short for short, long in ALIASES.items() if long == name), name)
    if name and name not in settings:
        advice = did_you_mean(name, [*settings, *ALIASES.values()]) or f"there are {', '.join(settings)}"
        raise RequestError(f"there is no setting {printable(name, 40)}: {advice}")
    if value and name in SWITCHES:
        if value.lower() not in ON:
            raise RequestError(f"{name} must be on or off, not {printable(value, 40)}")
        if name == "stats":
            chat.show_stats = ON[value.lower()]
        else:
            chat.display.markdown = ON[value.lower()]
    elif value:
        params = changed(talk.params, name, value, talk.first_params)
        talk.engine.tokenizer.check_thinking(params.thinking)
        talk.params = params
    for shown in [name] if name else settings:
        chat.display.two_columns(f"{shown} {_setting(chat, shown)}", settings[shown], 26)


def _setting(chat: Chat, name: str) -> str:
    if name in SWITCHES:
        return "on" if (chat.show_stats if name == "stats" else chat.display.markdown) else "off"
    return value_text(chat.conversation.params, name)


def attach(chat: Chat, name: str) -> None:
    attachment = read_attachment(_named(name, "notes.txt"), chat.conversation.engine)
    if chat.conversation.raw:
        chat.answer(lambda: chat.conversation.ask(attachment.text))
        return
    chat.attachments.append(attachment)
    chat.note(f"{printable(attachment.name)}, {len(attachment.text):,} characters: goes with your next question")


def save(chat: Chat, name: str) -> None:
    path = file_path(_named(name, "chat.json"))
    if not chat.conversation.messages:
        chat.note("there is nothing to save yet")  # and an earlier conversation in the file stays
        return
    chat.conversation.save(path)
    chat.note(f"saved {len(chat.conversation.messages)} messages to {printable(name)}")


def load(chat: Chat, name: str) -> None:
    chat.conversation.load(file_path(_named(name, "chat.json")))
    console = chat.display.console
    for i, message in enumerate(chat.conversation.messages):
        # Text for other programs stays as it is.
        thought, text = chat.conversation.split(message) if console.is_terminal else ("", message["content"])
        if thought:
            console.print(Text(f"{clean(thought)}\n", "dim"))
        if message["role"] == "user":
            before = "\n" if i else ""
            console.print(Text(f"{before}> {clean(text)}", "bold cyan"))
            continue
        view = chat.display.new_view()
        view.push(clean(text))
        view.finish()
    chat.note(f"loaded {len(chat.conversation.messages)} messages from {printable(name)}")


def export(chat: Chat, name: str) -> None:
    path = file_path(_named(name, "chat.md"))
    if not chat.conversation.messages:
        chat.note("there is nothing to export yet")
        return
    chat.conversation.export(path, f"A conversation with {chat.title}")
    chat.note(f"exported {len(chat.conversation.messages)} messages to {printable(name)}")


def copy(chat: Chat, _: str) -> None:
    """Puts the last answer on the clipboard by OSC 52, which also works through SSH."""
    talk = chat.conversation
    text = talk.split(talk.messages[-1])[1] if talk.messages else talk.last.text if talk.last is not None else ""
    if not text:
        raise RequestError("there is no answer yet")
    write(f"\x1b]52;c;{b64encode(well_formed(text).encode()).decode()}\x07")
    chat.note(f"copied {len(text):,} characters, if this terminal lets programs write to the clipboard (OSC 52)")


def stats(chat: Chat, _: str) -> None:
    last = chat.conversation.last
    chat.note("no answer yet" if last is None else describe(last, chat.conversation))


def show_help(chat: Chat, _: str) -> None:
    for command in offered(chat.conversation.raw):
        also = f" (also {', '.join(command.aliases)})" if command.aliases else ""
        chat.display.two_columns(command.usage, command.description + also, 18)
    chat.note("Alt-Enter, or three quotes around it: text of several lines. Up and Down: earlier input.")
    chat.note("Ctrl-X Ctrl-E: your editor. A leading space sends a line that begins with a slash.")


def _named(name: str, example: str) -> str:
    if not name:
        raise RequestError(f"give a file name, such as {example}")
    return name


COMMANDS = (
    Command("/continue", "", "go on with an answer that was cut or stopped", go_on),
    Command("/regen", "", "answer the last question again", regenerate),
    Command("/retry", "", "the same with another seed", retry),
    Command("/edit", "", "change the last question and ask again", edit),
    Command("/undo", "", "remove the last question and answer", undo, turns=True),
    Command("/clear", "", "start over", clear, ("/reset",), turns=True),
    Command("/system", "[TEXT]", "show or set the system message; - removes it", system, turns=True),
    Command("/set", "[NAME VALUE]", "show or change how answers are made", set_option),
    Command("/file", "FILE", "put a text file into the next question", attach),
    Command("/save", "FILE", "write the conversation to a file, for /load", save, turns=True),
    Command("/load", "FILE", "continue a conversation from a file", load, turns=True),
    Command("/export", "FILE", "write the conversation to a file as Markdown", export, turns=True),
    Command("/copy", "", "copy the last answer to the clipboard", copy),
    Command("/stats", "", "speed, context and memory of the last answer", stats),
    Command("/help", "", "show this list", show_help, ("/?",)),
    Command("/exit", "", "leave; so does Ctrl-D", None, ("/bye", "/quit", "exit", "quit")),
)
RAW_DESCRIPTIONS = {
    "/regen": "continue the last text again, from the same start",
    "/edit": "change the last text and continue it again",
    "/file": "continue the text of a file",
    "/continue": "go on with a text that was cut or stopped",
}


def offered(raw: bool) -> list[Command]:
    """The commands that make sense, with turns or without."""
    if not raw:
        return list(COMMANDS)
    return [
        Command(c.name, c.argument, RAW_DESCRIPTIONS.get(c.name, c.description), c.run, c.aliases)
        for c in COMMANDS
        if not c.turns
    ]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Asks for the known name that this one begins or nearly is; empty if there is none."""
    name, known = name[:100].lower(), list(known)
    return suggestion(name, known, surely=[each for each in known if len(name) > 2 and each.startswith(name)])


def find_command(word: str) -> Command | None:
    """The command of a name or alias, in any case."""
    return next((c for c in COMMANDS if word.lower() in (c.name, *c.aliases)), None)
