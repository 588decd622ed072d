"""Threads that compute: as many as were asked for, or as this process has CPUs, and never more.

More would wait for each other, and for whatever else runs on the cores: a prompt then takes many times as long.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from threadpoolctl import threadpool_info

import bitnet_numba as bn
from bitnet_numba.backends import cores
from bitnet_numba.backends.cores import cpu_quota, usable_cores, usable_cpus
from bitnet_numba.backends.cpu.backend import CpuModel
from bitnet_numba.backends.cuda import warmup
from bitnet_numba.backends.reference import ReferenceModel
from bitnet_numba.checkpoint.packed import PackedCheckpoint
from bitnet_numba.reference.model import Model

# Prints how many threads the first pass started, and the share of each thread in the time that prompts then took.
COMPUTING = """
import json, os, sys, time
cpus, threads = json.loads(sys.argv[1])
if cpus:
    os.sched_setaffinity(0, cpus)
import bitnet_numba as bn

def times():
    found = {}
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/schedstat") as file:
            found[task] = int(file.read().split()[0])
    return found

llm = bn.load(None, "cpu", threads=threads)
before = times()
llm.generate(list(range(5, 105)), max_new_tokens=1)
started = times()
end = time.monotonic() + 0.5
while time.monotonic() < end:
    llm.session().generate(list(range(5, 505)), max_new_tokens=1)
spent = {task: t - started.get(task, 0) for task, t in times().items()}
print(json.dumps([len(started) - len(before), sorted(t / sum(spent.values()) for t in spent.values())]))
"""


def computing(cpus: list[int], threads: int | None) -> tuple[int, int]:
    """Threads started beside the caller's, and threads that computed prompts, in a process that may use `cpus`."""
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    command = [sys.executable, "-c", COMPUTING, json.dumps([cpus, threads])]
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr
    started, shares = json.loads(done.stdout)
    return started, sum(share > 0.02 for share in shares)


@pytest.mark.skipif(not os.path.exists("/proc/self/schedstat"), reason="no accounts of threads to look at")
def test_prompts_on_the_cpu_use_the_threads_that_were_asked_for() -> None:
    """And none of BLAS, which has one for every CPU."""
    one = sorted(os.sched_getaffinity(0))[:1]
    for cpus, threads, expected in (([], None, usable_cores()), ([], 1, 1), ([], 3, 3), (one, None, 1)):
        started, computed = computing(cpus, threads)
        assert started == expected - 1
        assert 1 <= computed <= expected


def test_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 <= usable_cores() <= usable_cpus() <= (os.cpu_count() or 1)
    if hasattr(os, "sched_getaffinity"):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
        assert usable_cores() == usable_cpus() == 1


V2, V1 = "0::/a/b\n", "9:name=systemd:/x\n4:memory:/y\n2:cpu,cpuacct:/docker/1f\n1:cpuset:/z\n"


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (V2, {}, None),
        (V2, {"a/b/cpu.max": "max 100000\n"}, None),
        (V2, {"a/b/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "200000 100000\n"}, 2.0),
        (V2, {"a/b/cpu.max": "300000 100000\n", "a/cpu.max": "50000 100000\n"}, 0.5),
        ("0::/\n", {"cpu.max": "400000 100000\n"}, 4.0),  # as a container with a name space of its own sees it
        (V1, {"cpu/docker/1f/cpu.cfs_quota_us": "-1\n", "cpu/docker/1f/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/docker/1f/cpu.cfs_quota_us": "250000\n", "cpu/docker/1f/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 1.0),  # and without one
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n"}, None),
        (V2, {"a/b/cpu.max": "many\n"}, None),
        (V2, {"a/b/cpu.max": "100000 0\n", "a/cpu.max": "0 100000\n"}, None),
        (V2, {"a/b/cpu.max": f"1{400 * '0'} 1\n", "a/cpu.max": "-1 100000\n", "cpu.max": "100000 100000\n"}, 1.0),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "0\n"}, None),
        ("nonsense", {"cpu.max": "100000 100000\n"}, None),
    ],
)
def test_quotas(tmp_path: Path, groups: str, files: dict[str, str], quota: float | None) -> None:
    for name, text in {"proc/self/cgroup": groups, **{f"sys/fs/cgroup/{n}": t for n, t in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_a_container_with_a_share_of_the_cpus(
    demo: PackedCheckpoint, tiny_packed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each default follows: the team's threads, those of BLAS, and the processes that compile."""
    monkeypatch.setattr(cores, "_allowed", lambda: set(range(64)))
    monkeypatch.delenv("BITNET_NUMBA_COMPILERS", raising=False)
    for quota, expected in ((0.2, 1), (1.0, 1), (3.4, 3), (100.0, 64), (None, 64)):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        assert usable_cpus() == warmup._most_processes() == expected
        assert CpuModel(demo).threads == usable_cores() <= expected
    seen: list[set[int]] = []
    forward = Model.forward

    def count(*arguments: object) -> object:
        seen.append({pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"})
        return forward(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Model, "forward", count)
    monkeypatch.setattr(cores, "cpu_quota", lambda: 0.5)
    with bn.load(tiny_packed, "reference") as llm:
        llm.generate([5, 6], max_new_tokens=1)
    assert seen and all(pools <= {1} for pools in seen)


def test_the_reference_leaves_blas_its_threads_where_it_has_the_cpus(
    demo: PackedCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    for quota in (None, 1024.0):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        assert ReferenceModel(demo)._threads is None
    assert ReferenceModel(demo, 3)._threads == 3
