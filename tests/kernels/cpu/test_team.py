"""Threads that compute a step together: nothing is lost or done twice, however many members share the cores."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from numba import njit

from bitnet_numba.kernels.cpu import team
from bitnet_numba.kernels.cpu.compiler import entry
from bitnet_numba.kernels.cpu.vec import address_of

PIECES = 37


@njit(error_model="numpy")
def step(member, members, state, counts):
    """Each region's pieces add 1 to what the region before left: a lost barrier would show as a wrong count."""
    regions = len(counts) - 1
    for region in range(regions):
        while True:
            piece = team.take(state)
            if piece >= PIECES:
                break
            if region == 0 or counts[region - 1, piece] == 1:
                team.atomic_add(address_of(counts), region * counts.shape[1] + piece, 1)
        team.barrier(state, members)
    team.atomic_add(address_of(counts), regions * counts.shape[1] + member, 1)
    team.barrier(state, members)


@entry
def serve(member, members, state, counts):
    job = 0
    while True:
        job = team.next_job(state, job)
        if job < 0:
            return
        step(member, members, state, counts)


@entry
def run(members, state, counts):
    team.start_job(state)
    step(0, members, state, counts)


@pytest.fixture
def counts() -> np.ndarray:
    return np.zeros((51, PIECES), np.int32)


@pytest.mark.parametrize("members", [1, 2, 3, 8])
def test_every_piece_is_done_once_and_every_member_comes(members, counts):
    threads = team.Team(members, serve, (counts,))
    try:
        for jobs in range(20):
            counts[:] = 0
            run(members, threads.state, counts)
            assert (counts[:-1] == 1).all()
            assert (counts[-1, :members] == 1).all() and not counts[-1, members:].any()
            if jobs == 10:
                time.sleep(0.05)  # long enough that the members sleep
    finally:
        threads.stop()
    assert threading.active_count() < members + 10


@entry
def next_job(state, job):
    return team.next_job(address_of(state), job)


@pytest.mark.parametrize("before", [1, 2**31 - 1, 2**31, 2**32 - 1])
def test_numbers_of_jobs_do_not_run_out(before):
    state, after = np.zeros(team.STATE_WORDS, np.int32), (before + 1) % 2**32
    state[team.JOB] = np.uint32(after).astype(np.int32)
    assert next_job(state, before) == after


def test_threads_that_cannot_be_started_leave_none_behind(counts, monkeypatch):
    start, started = threading.Thread.start, []

    def third_fails(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        team.Team(4, serve, (counts,))
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)


def test_a_team_that_waits_uses_no_cpu(counts):
    threads = team.Team(2, serve, (counts,))
    try:
        run(2, threads.state, counts)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25
    finally:
        threads.stop()


def test_a_process_ends_with_a_team_that_nobody_stopped():
    code = """
import numpy as np
from tests.kernels.cpu.test_team import run, serve, team
counts = np.zeros((51, 37), np.int32)
threads = team.Team(3, serve, (counts,))
run(3, threads.state, counts)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
