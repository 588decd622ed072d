"""The process that renders templates: its limits, and that it neither outlives nor confuses those who use it."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from bitnet_numba.errors import TokenizerError
from bitnet_numba.text.template_process import TemplateLimit, TemplateProcess

SLOW = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
ECHO = "{{ x }}"


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess(seconds=0.2)
    yield process
    process.stop()


@pytest.mark.parametrize(
    "source",
    [
        SLOW,
        "{{ 9 ** (9 ** 9) }}",  # one operation, which nothing inside the interpreter could interrupt
        "{{ ('a' * 999999).rfind('b' * 499999 ~ 'a') }}{{ ('ab' * 499999).strip('b' * 99999 ~ 'a') }}" * 99,
        "{{ range(99999) | map('string') | reject('in', range(99999) | map('string') | list) | list }}",
        "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{% macro a() %}{% endmacro %}" * 20_000,
        "{{ 1 }}" * 120_000,
        "{{ lipsum(n=100000) }}",
        "{{ 'x' | center(30000000000) }}",
        "{{ '%1000000000000d' % 1 }}{{ '{:>1000000000000}'.format(1) }}",
        "{{ ('a' * 99999).replace('a', 'b' * 99999) }}",
        "{{ ('a' * 99999).replace(*('a', 'b' * 99999)) }}{{ 'a' * 99999 | replace(old='a', new='b' * 99999) }}",
        "{{ ('a' * 999999).rindex('b' * 499999 ~ 'a') }}{{ 1 / 0 }}" * 99,
        "{% for i in range(99999) %}{{ ('a' * 999999).rpartition('b' * 499999 ~ 'a') | length }}{% endfor %}",
        "{% for i in range(99999) %}{{ ('a' * 999999).rsplit('b' * 499999 ~ 'a') | length }}{% endfor %}",
        "{{ range(99999) | map('string') | map('list') | selectattr(0, 'in', range(99999) | list) | list }}",
        "{{ 'x'.zfill(99999999) }}",
    ],
    ids=lambda source: source[:40],
)
def test_a_template_that_takes_too_much_ends_alone(process: TemplateProcess, source: str) -> None:
    started = time.monotonic()
    with pytest.raises(TemplateLimit, match="chat template: it ") as caught:
        process.render(source, {})
    assert str(caught.value).isprintable() and time.monotonic() - started < 60
    assert process.render(ECHO, {"x": "fine"}) == "fine"


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not bound the memory of a process")
def test_memory_is_bounded_and_the_process_replaced_after_that(process: TemplateProcess) -> None:
    with pytest.raises(TemplateLimit, match="it needs more than 1024 MB of memory"):
        process.render("{{ 'x' | center(1500000000) }}", {})
    assert process._process is None


@pytest.mark.parametrize("source", ["{{ " + "(" * 3000, "{{ " + "-" * 50_000 + "1 }}", "{% if 1 %}" * 3000])
def test_nesting_without_end_is_an_error(process: TemplateProcess, source: str) -> None:
    with pytest.raises(TokenizerError, match="chat template: "):
        process.render(source, {})


def test_one_process_renders_for_all_threads(process: TemplateProcess) -> None:
    with ThreadPoolExecutor(8) as pool:
        texts = [str(i) * (i * 1000) for i in range(40)]
        assert list(pool.map(lambda text: process.render(ECHO, {"x": text}), texts)) == texts


def test_a_process_that_was_killed_is_replaced(process: TemplateProcess) -> None:
    process.render(ECHO, {"x": "\ud83d\U0001f642\x00"})
    running = process._process
    assert running is not None
    running.kill()
    running.wait()
    assert process.render(ECHO, {"x": "\ud83d\U0001f642\x00"}) == "\ud83d\U0001f642\x00"


def test_an_interrupt_does_not_leave_a_reply_for_the_next(
    process: TemplateProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bitnet_numba.text import template_process

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(template_process, "_read", interrupted)
        process.render(ECHO, {"x": "old"})
    assert process.render(ECHO, {"x": "new"}) == "new"


PARENT = """
import os, sys
from bitnet_numba.text.template_process import PROCESS
PROCESS.render("{{ x }}", {"x": "a"})
print(PROCESS._process.pid, flush=True)
os.close(0), os.close(1), os.close(2)
assert PROCESS.render("{{ x }}", {"x": "b"}) == "b"
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_it_ends_when_its_parent_is_killed() -> None:
    parent = subprocess.run([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.returncode == -9
    pid = int(parent.stdout)
    for _ in range(1000):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        stat = Path(f"/proc/{pid}/stat")
        if stat.exists() and ") Z " in stat.read_text():  # where nobody collects the dead, it stays as a zombie
            return
        time.sleep(0.01)
    raise AssertionError("the process is still there")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX only")
def test_a_forked_child_gets_a_process_of_its_own() -> None:
    script = """
import os, signal
from bitnet_numba.text.template_process import PROCESS
PROCESS.render("{{ x }}", {"x": "a"})
first = PROCESS._process.pid
PROCESS._lock.acquire()  # as if another thread was rendering
child = os.fork()
if child == 0:
    signal.alarm(20)  # rather than wait for ever
    ok = PROCESS.render("{{ x }}", {"x": "child"}) == "child" and PROCESS._process.pid != first
    os._exit(not ok)
PROCESS._lock.release()
assert os.waitpid(child, 0)[1] == 0
assert PROCESS.render("{{ x }}", {"x": "parent"}) == "parent" and PROCESS._process.pid == first
"""
    done = subprocess.run([sys.executable, "-W", "error", "-X", "dev", "-c", script], capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_without_a_python_to_start_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(TokenizerError, match="no process to render"):
        TemplateProcess().render(ECHO, {"x": "a"})
