"""docs/command-line.md and README: every command line that they show is understood, and every chat command is there."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

from bitnet_numba.chat.chat_commands import COMMANDS as CHAT_COMMANDS
from bitnet_numba.chat.chat_commands import SETTINGS
from bitnet_numba.cli.completion import whole_parser
from bitnet_numba.cli.main import COMMANDS

ROOT = Path(__file__).parent.parent.parent


def command_lines(page: Path) -> list[list[str]]:
    """The arguments of each `bitnet-numba` in the code blocks of a page."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.splitlines():
            if re.match(r"\s*(\$ )?(bitnet-numba|cat|echo|eval)\b", line) and "bitnet-numba" in line:
                words = shlex.split(line.replace('"$(', "").replace(')"', ""), comments=True)
                words = words[words.index("bitnet-numba") + 1 :]
                found.append(words[: words.index(">")] if ">" in words else words)
    return found


PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted(ROOT.glob("docs/*.md")))]


def is_installed(command: str) -> bool:
    """Whether a command can be started: some need an extra."""
    try:
        return command not in COMMANDS or bool(importlib.import_module(COMMANDS[command][0]))
    except ImportError:
        return False


@pytest.mark.parametrize("page", PAGES)
def test_every_command_line_is_understood(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = command_lines(ROOT / page)
    assert len(lines) >= 4 or page not in ("README.md", "docs/command-line.md")
    parser = whole_parser()
    for words in lines:
        if words in ([], ["COMMAND", "--help"]) or not is_installed(words[0]):
            continue
        try:
            parser.parse_args(words)
        except SystemExit:
            pytest.fail(f"{page}: {words}: {capsys.readouterr().err}")


def test_every_command_is_documented() -> None:
    text = (ROOT / "docs/command-line.md").read_text()
    assert all(f"bitnet-numba {command}" in text for command in COMMANDS)
    for command in CHAT_COMMANDS:
        assert all(f"`{name}" in text for name in (command.name, *command.aliases)), command.name
        assert f"`{command.usage}`" in text
    assert all(f"`{name}`" in text for name in SETTINGS)
