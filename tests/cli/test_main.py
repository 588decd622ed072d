"""The command `bitnet-numba`: which command is started, how soon, and what is said of mistakes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import huggingface_hub
import pytest

import bitnet_numba
from bitnet_numba.cli.main import COMMANDS, main

TIMEOUT = 120


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == main(["help"]) == 0
    out, err = capsys.readouterr()
    assert not err and all(out.count(f"\n  {name} ") == 3 for name in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"bitnet-numba {bitnet_numba.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chta"], "unknown command 'chta'; did you mean chat?"),
        (["--verson"], "unknown option '--verson': did you mean --version? (see --help)"),
        (["Convert", "a", "b"], "unknown command 'Convert'; did you mean convert?"),
        (["zzz"], f"unknown command 'zzz'; commands: {', '.join(COMMANDS)}"),
        (["\x1b[2J\n"], f"unknown command '\\x1b[2J\\n'; commands: {', '.join(COMMANDS)}"),
        (["--no-such"], "unknown option '--no-such' (see --help)"),
    ],
)
def test_mistakes(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr() == ("", f"bitnet-numba: {message}\n")


def test_an_option_of_a_command_in_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["models", "list", "--knwon"])
    assert "unrecognized arguments: --knwon: did you mean --known? (see --help)" in capsys.readouterr().err


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_help_and_its_name(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code in (([command, "--help"], 0), ([command, "--no-such-option"], 2), (["help", command], 0)):
        with pytest.raises(SystemExit) as leaving:
            main(arguments)
        assert leaving.value.code == code
    out, err = capsys.readouterr()
    assert out.startswith(f"usage: bitnet-numba {command} ")
    assert not re.search(r"\d[eE][+-]?\d", out)  # a default such as 4.1943e+06
    assert err.startswith(f"bitnet-numba {command}") and err.count("\n") == 1


def test_chat_is_called_by_the_name_that_was_typed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITNET_NUMBA_MODELS", str(tmp_path / "models"))
    assert main(["chat", "someone/else", "--prompt", "x"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("bitnet-numba chat: someone/else is not a local folder") and err.count("\n") == 1


def test_chat_with_a_model_of_the_hub(
    tiny_source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From Hugging Face's cache, which is said; what is asked for on standard output is the answer alone."""
    monkeypatch.setenv("BITNET_NUMBA_MODELS", str(tmp_path / "models"))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **options: str(tiny_source))
    monkeypatch.setattr(sys, "stdin", None)
    arguments = ["chat", "someone/tiny", "--backend", "reference", "--max-new-tokens", "3", "--json", "--prompt", "Hi"]
    assert main([*arguments, "--revision", "v1"]) == 0
    first, err = capsys.readouterr()
    assert err.splitlines() == [
        "bitnet-numba chat: someone/tiny (v1) is taken from the Hugging Face cache as it is: "
        "offline (HF_HUB_OFFLINE is set)",
        "converting someone/tiny (v1)",
    ]
    assert len(json.loads(first)["token_ids"]) <= 3
    assert main([*arguments, "--revision", "v1"]) == 0
    assert capsys.readouterr().err == "", "the second time, it is there"
    assert main(["chat", str(tmp_path), "--revision", "v1", "--prompt", "Hi"]) == 2
    assert capsys.readouterr().err == "bitnet-numba chat: a revision needs a hub id, not a folder\n"


def test_starting_is_light() -> None:
    """What only prints, and finding out which command is meant, load no heavy library."""
    code = (
        "import sys, bitnet_numba.cli.main as cli\n"
        "cli.main(['--version']); cli.main(['no-such-command'])\n"
        "heavy = {'numpy', 'numba', 'jinja2', 'tokenizers', 'rich', 'prompt_toolkit', 'huggingface_hub'}\n"
        "found = heavy & set(sys.modules)\n"
        "from bitnet_numba.cli import convert, doctor, models\n"
        "found |= (heavy - {'numpy', 'jinja2', 'tokenizers'}) & set(sys.modules)\n"
        "sys.exit(', '.join(found) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


def test_next_to_nothing_is_imported_before_ctrl_c_is_handled() -> None:
    root = Path(bitnet_numba.__file__).parent.parent
    code = (
        f"import sys; sys.path.append({str(root)!r})\n"
        "import bitnet_numba.__main__, bitnet_numba.chat.__main__\n"
        "if 'bitnet_numba.commands' in sys.modules: sys.exit('what is not handled yet must be next to nothing')\n"
        "import bitnet_numba.cli.main\n"
        "sys.exit(', '.join({'argparse', 'difflib', 're', 'typing'} & set(sys.modules)) or 0)"
    )
    # Without site, which imports whatever other packages ask it to.
    done = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["signal", "bitnet_numba.commands", "bitnet_numba.errors"])
@pytest.mark.parametrize("package", ["bitnet_numba", "bitnet_numba.chat", "bitnet_numba.server"])
def test_ctrl_c_before_it_is_handled(package: str, name: str) -> None:
    """Entry points catch it from their first line on."""
    script = (
        "import sys\nclass Finder:\n def find_spec(self, name, *_):\n"
        f"  if name == {name!r}: raise KeyboardInterrupt\n"
        f"import {package}\nsys.meta_path.insert(0, Finder())\nsys.modules.pop('signal', None)\n"
        f"from {package}.__main__ import main\nsys.exit(main())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT)
    prog = {"": "bitnet-numba", "chat": "bitnet-chat", "server": "python -m bitnet_numba.server"}
    expected = (130, "", f"{prog[package.partition('.')[2]]}: interrupted\n")
    assert (done.returncode, done.stdout, done.stderr) == expected


INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(0.1)\n"


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
@pytest.mark.parametrize(
    "lines",
    [
        "import swallowing",  # as Python does in callbacks of its imports
        "import ctypes; ctypes.CFUNCTYPE(None)(lambda: exec(INTERRUPTED))()",  # as llvmlite while it compiles
        "class Z:\n        def __del__(self): exec(INTERRUPTED)\n    Z()",
    ],
)
def test_ctrl_c_where_exceptions_are_swallowed(tmp_path: Path, lines: str) -> None:
    """A command is interrupted when that is over."""
    swallowed = "".join(f"    {line}\n" for line in INTERRUPTED.splitlines())
    (tmp_path / "swallowing.py").write_text(f"try:\n{swallowed}except BaseException:\n    pass\n")
    (tmp_path / "command.py").write_text(
        f"import time\nINTERRUPTED = {INTERRUPTED!r}\ndef run(argv, prog):\n    {lines}\n"
        "    print('over', flush=True)\n    time.sleep(3600)\n    return 0\n"
    )
    script = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from bitnet_numba.commands import start\ncode = start('p', 'command', [])\n"
        "sys.exit(code if signal.getsignal(signal.SIGINT) is signal.SIG_IGN else 1)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stdout, done.stderr) == (130, "over\n", "p: interrupted\n")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")
def test_ctrl_c_in_the_first_second() -> None:
    """While a command's libraries are imported, where an exception might be swallowed."""
    script = (
        "import os, signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Finder:\n def find_spec(self, name, *_):\n  if name in ('numpy', 'difflib'):\n"
        "   try: os.kill(os.getpid(), signal.SIGINT)\n   except BaseException: pass\n"
        "sys.meta_path.insert(0, Finder())\nfrom bitnet_numba.cli.main import main\nsys.exit(main([sys.argv[1]]))"
    )
    for command in ("chat", "convert", "models", "unknown"):
        done = subprocess.run([sys.executable, "-c", script, command], capture_output=True, text=True, timeout=TIMEOUT)
        prog = "bitnet-numba" if command == "unknown" else f"bitnet-numba {command}"
        expected = (130, "", f"{prog}: interrupted\n")
        assert (done.returncode, done.stdout, done.stderr) == expected


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")
def test_full_or_closed_standard_output() -> None:
    with open("/dev/full", "w") as full:
        command = [sys.executable, "-m", "bitnet_numba", "--version"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (2, "bitnet-numba: output failed: No space left on device\n")
    code = "import signal, sys; sys.stdout = None; from bitnet_numba.cli.main import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT)
    assert (done.returncode, done.stderr) == (2, "bitnet-numba: standard output is closed\n")


def test_no_message_names_a_file_that_an_install_lacks() -> None:
    """pip does not install tools/: no text of the package may send anybody there."""
    root = Path(bitnet_numba.__file__).parent.parent
    for folder in ("bitnet_numba", "kernels", "reference"):
        for path in (root / folder).rglob("*.py"):
            text = path.read_text()
            assert "tools/" not in text and "convert.py" not in text.replace("checkpoint/convert.py", ""), path
