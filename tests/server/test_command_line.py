"""`bitnet-numba serve`: options, keys, mistakes, and the life of a process."""

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from bitnet_numba.errors import RequestError
from bitnet_numba.server.command_line import BUILT_IN, KEYS_VARIABLE, build_parser, read_keys, read_settings, run
from bitnet_numba.server.settings import Settings

ROOT = Path(__file__).parent.parent.parent


def settings_of(*arguments: str) -> Settings:
    """The settings of a command line."""
    return read_settings(build_parser().parse_args(arguments))


def test_the_defaults_are_those_of_the_settings() -> None:
    own = settings_of()
    assert own.models == (BUILT_IN,) and "localhost" in own.allowed_hosts and "127.0.0.1" in own.allowed_hosts
    for name in ("max_sequences", "max_waiting", "answer_timeout", "drain_timeout", "max_body", "coalesce", "tokens"):
        assert getattr(own, name) == getattr(Settings(), name)
    assert own.prefill_chunk is None and settings_of("--prefill-chunk", "100").prefill_chunk == 100
    assert settings_of("owner/name").models == ("owner/name",)
    assert settings_of("owner/name", "--name", "a", "--name", "b").models == ("a", "b")
    assert settings_of(str(ROOT / "tests" / "server")).models == ("server",)
    gguf = ROOT / "tests" / "golden" / "gguf" / "llama-tq2_0.gguf"
    assert settings_of(str(gguf)).models == ("llama-tq2_0.gguf",), "no path of this machine is told to clients"
    assert settings_of("owner/name/m.gguf").models == ("owner/name/m.gguf",)
    assert settings_of("--host", "0.0.0.0").allowed_hosts == ()
    assert settings_of("--host", "0.0.0.0", "--allow-host", "A.example").allowed_hosts == ("a.example",)


def test_keys_come_from_a_file_and_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert read_keys(None) == ()
    file = tmp_path / "keys"
    file.write_text("# of the team\n one \n\ntwo\n")
    assert read_keys(file) == ("one", "two")
    monkeypatch.setenv(KEYS_VARIABLE, "three four")
    assert read_keys(file) == ("three", "four", "one", "two")
    file.write_text("# none\n")
    for bad in (file, tmp_path / "missing", tmp_path):
        with pytest.raises(RequestError, match="--api-key-file"):
            read_keys(bad)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--port", "70000"], "--port must be between 0 and 65535, not 70000"),
        (["--max-waiting", "-1"], "--max-waiting must be"),
        (["--max-sequences", "0"], "--max-sequences must be"),
        (["--prefill-chunk", "0"], "--prefill-chunk must be"),
        (["--answer-timeout", "nan"], "--answer-timeout must be"),
        (["--host", "no.such.host.invalid"], "cannot listen on no.such.host.invalid"),
        (["./no-such-folder"], "no-such-folder"),
        (["--backend", "cuda", "--threads", "2"], "threads are an option of the backends cpu and reference"),
    ],
)
def test_mistakes_are_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*arguments, *([] if "--port" in arguments else ["--port", "0"])], "serve") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("serve: ") and message in last


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(["--port", str(port)], "serve") == 2
    assert capsys.readouterr().err == f"serve: cannot listen on 127.0.0.1 port {port}: Address already in use\n"


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in [name for name in sys.modules if name.startswith("bitnet_numba.server.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "starlette.applications", None)
    from bitnet_numba.server import command_line

    monkeypatch.setattr(command_line, "load", lambda *_, **options: None)  # it has begun by then, in a thread
    assert command_line.run([], "serve") == 2
    assert "pip install 'bitnet-numba[serve]'" in capsys.readouterr().err


def test_the_extra_is_looked_for_before_a_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Which might be a download."""
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert run(["./no-such-folder"], "serve") == 2
    assert capsys.readouterr().err.startswith("serve: uvicorn is not installed: install the extra serve, as in  pip")


def test_the_model_does_not_wait_for_the_modules_that_serve() -> None:
    code = """if True:
        import sys, threading
        from bitnet_numba.errors import RequestError
        from bitnet_numba.server import launch
        from bitnet_numba.server.settings import Settings
        heavy = {"httptools", "prometheus_client", "pydantic", "starlette", "uvicorn"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        class Finder:  # lets the import of uvicorn wait until the model is being loaded
            def find_spec(self, name, path=None, target=None):
                if name == "uvicorn":
                    assert loading.wait(30.0), "the import did not wait for the model, nor the model for it"
        loading = threading.Event()
        sys.meta_path.insert(0, Finder())
        def load():
            loading.set()
            raise RequestError("there is no model")
        try:
            launch.serve(Settings(), "127.0.0.1", 0, load)
        except RequestError as error:
            assert str(error) == "there is no model", error
        else:
            raise SystemExit("no error")
    """
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_life_of_a_process(number: int) -> None:
    code = """if True:
        import atexit, gc, sys
        from bitnet_numba.server.__main__ import main
        atexit.register(lambda: print(gc.get_freeze_count(), "objects frozen", file=sys.stderr))
        sys.exit(main())
    """
    command = [sys.executable, "-c", code, "--port", "0", "--backend", "reference", "--log-requests"]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        lines = [process.stderr.readline()]
        found = re.search(r"http://[\d.:]+", lines[0])
        assert found, lines
        lines.append(process.stderr.readline())
        assert f"{BUILT_IN} answers at {found[0]} (reference, context 2048)" in lines[1]
        prompt = {"prompt": "A secret", "max_tokens": 2}
        answer = httpx.post(f"{found[0]}/v1/completions", json=prompt, trust_env=False, timeout=60)
        assert answer.status_code == 200
        process.send_signal(number)
        _, rest = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0 and "Traceback" not in rest
    assert int(rest.splitlines()[-1].split()[0]) > 10_000, "the model is looked at by the garbage collector"
    assert "POST /v1/completions 200 " in rest and answer.headers["x-request-id"] in rest and "secret" not in rest


def test_ctrl_c_while_the_event_loop_starts() -> None:
    """An exception in the midst of that is followed by others."""
    code = """if True:
        import os, signal, sys, uvicorn
        signal.signal(signal.SIGINT, signal.default_int_handler)
        def begin(self, sockets):
            try:
                os.kill(os.getpid(), signal.SIGINT)
            except KeyboardInterrupt:
                raise RuntimeError("this event loop is already running")
        uvicorn.Server.run = begin
        from bitnet_numba.server.__main__ import main
        sys.exit(main())
    """
    command = [sys.executable, "-c", code, "--port", "0", "--backend", "reference"]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 130 and done.stderr.splitlines()[1:] == ["python -m bitnet_numba.server: interrupted"]
