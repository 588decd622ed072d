"""The systemd unit and the Dockerfile of docs/serving.md say what is so."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitnet_numba.hub.store import cache_folder
from bitnet_numba.kernels.runtime import disk_cache
from bitnet_numba.server.command_line import DEFAULTS, build_parser
from tests.engine.toy_backend import tokens_of, toy_engine
from tests.server.helpers import free_port, serving

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "serving.md").read_text()
PROJECT = (ROOT / "pyproject.toml").read_text()


def block(language: str) -> str:
    """The only code of that language on the page."""
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    return str(found)


def settings_of(unit: str) -> dict[str, list[str]]:
    """The values of each key, in order."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what follows them."""
    text = re.sub(r"^#.*\n", "", block("dockerfile"), flags=re.MULTILINE).replace("\\\n", " ")
    return [(line.split()[0], line.split(maxsplit=1)[1].strip()) for line in text.splitlines()]


def test_the_unit_is_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("there is no systemd-analyze here")
    program = shlex.split(settings_of(block("ini"))["ExecStart"][0])[0]
    for unit, is_valid in ((block("ini"), True), (block("ini").replace("DynamicUser=yes", "DynamicUser=often"), False)):
        file = tmp_path / "bitnet-numba.service"
        file.write_text(unit.replace(program, sys.executable))  # it must be there
        done = subprocess.run(["systemd-analyze", "verify", "--man=no", file], capture_output=True, text=True)
        assert (done.returncode == 0 and not done.stderr) == is_valid, done.stderr


def test_the_unit_starts_a_server_and_gives_it_time_to_end() -> None:
    unit = settings_of(block("ini"))
    program, command, *arguments = shlex.split(unit["ExecStart"][0])
    assert f"\n{Path(program).name} = " in PROJECT and command == "serve"
    build_parser().parse_args(arguments)
    assert int(unit["TimeoutStopSec"][0]) > DEFAULTS.drain_timeout
    folders = {f"/var/lib/{unit['StateDirectory'][0]}", f"/var/cache/{unit['CacheDirectory'][0]}"}
    variables = dict(pair.split("=", 1) for value in unit["Environment"] for pair in value.split())
    assert all(any(value.startswith(folder) for folder in folders) for value in variables.values())
    assert set(variables) == {"BITNET_NUMBA_MODELS", "HF_HOME", "BITNET_NUMBA_CACHE"}


def test_the_image_has_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    steps = dockerfile()
    names = [name for name, _ in steps]
    assert names == ["FROM", "COPY", "RUN", "RUN", "USER", "VOLUME", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT"]
    given = dict(steps)
    minor = re.fullmatch(r"python:(3\.\d+)-slim", given["FROM"])
    assert minor and f"Programming Language :: Python :: {minor[1]}" in PROJECT
    wheels, folder = given["COPY"].split()
    wheel_dir = re.findall(r"`pip wheel --no-deps --wheel-dir (\S+) \.`", PAGE)
    assert wheels == f"{wheel_dir[0]}/*.whl"
    (extra,) = re.findall(rf"\$\(echo {folder}bitnet_numba-\*\.whl\)\[(\w+)\]", steps[2][1])
    assert f"\n{extra} = [" in PROJECT
    # What the user writes is in the volume, which is the user's.
    user, volume = given["USER"], given["VOLUME"]
    assert f"useradd --create-home {user} " in given["RUN"]
    assert given["RUN"].endswith(f"install --directory --owner={user} --group={user} {volume}")
    for name in ("BITNET_NUMBA_MODELS", "BITNET_NUMBA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", f"/home/{user}")
    for folder in (cache_folder(), disk_cache.folder()):
        assert folder.is_relative_to(volume)
    program, command, *arguments = json.loads(given["ENTRYPOINT"])
    assert f"\n{program} = " in PROJECT and command == "serve"
    args = build_parser().parse_args([*arguments, "2b4t"])
    assert (args.host, args.port) == ("0.0.0.0", int(given["EXPOSE"]))


def test_the_image_tells_of_its_health() -> None:
    health, port = dict(dockerfile())["HEALTHCHECK"], dict(dockerfile())["EXPOSE"]
    program, *arguments = json.loads(health.partition(" CMD ")[2])
    assert program == "python" and arguments[-1].count(port) == 1
    env = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}

    def is_healthy(at: int) -> bool:
        command = [sys.executable, *arguments[:-1], arguments[-1].replace(port, str(at))]
        return subprocess.run(command, env=env, capture_output=True, timeout=60).returncode == 0

    with serving(lambda: toy_engine(tokens_of(" fox"))[0]) as running:
        assert is_healthy(running.port)
        running.service.draining = True
        assert not is_healthy(running.port)
    assert not is_healthy(free_port())
