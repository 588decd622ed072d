"""`bitnet-numba completion`: the scripts are valid, and complete what there is."""

import shutil
import subprocess

import pytest

from bitnet_numba.cli.completion import SHELLS
from bitnet_numba.cli.main import COMMANDS, main

TRY = """
complete -p bitnet-numba >/dev/null || exit 1
try() {
  COMP_WORDS=(bitnet-numba "$@"); COMP_CWORD=$#; COMPREPLY=()
  _shtab_bitnet_numba bitnet-numba "${COMP_WORDS[$COMP_CWORD]}" ""
  echo "${COMPREPLY[@]}"
}
"""


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> str:
    """The script for a shell."""
    assert main(["completion", request.param]) == 0
    out, err = capsys.readouterr()
    assert not err
    return out


@pytest.mark.parametrize("script", ["bash"], indirect=True)
@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_what_bash_completes(script: str) -> None:
    wanted = {
        ("",): set(COMMANDS),
        ("do",): {"doctor"},
        ("chat", "--max"): {"--max-new-tokens"},
        ("chat", "--backend", ""): {"auto", "cuda", "cpu", "reference"},
        ("models", ""): {"list", "show", "rm", "path"},
        ("completion", ""): set(SHELLS),
    }
    lines = "".join(f"try {' '.join(repr(word) for word in words)}\n" for words in wanted)
    done = subprocess.run(["bash", "-c", script + TRY + lines], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and not done.stderr
    assert [set(line.split()) for line in done.stdout.splitlines()] == list(wanted.values())


@pytest.mark.parametrize("script", SHELLS, indirect=True)
def test_each_shell_accepts_its_script(script: str, request: pytest.FixtureRequest) -> None:
    shell = request.node.callspec.params["script"]
    assert all(command in script for command in COMMANDS) and "--temperature" in script
    if shutil.which(shell) is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([shell, "-n"], input=script, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_other_shells_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main(["completion", "cmd"])
    assert leaving.value.code == 2 and "invalid choice" in capsys.readouterr().err
