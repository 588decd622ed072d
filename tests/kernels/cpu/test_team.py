"""Threads that compute a step together: nothing is lost or done twice, however many members share the cores."""

import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from numba import njit

from bitnet_numba.kernels.cpu import layout, products, team
from bitnet_numba.kernels.cpu.compiler import entry
from bitnet_numba.kernels.cpu.vec import address_of

PIECES, REGIONS = 37, 50
NEVER = -1


@njit(error_model="numpy")
def stay_away(state, region, regions):
    """Until so many regions from `region` on are over, or the job is."""
    index_bits = team.INDEX_BITS
    current = region
    while current >> index_bits == region >> index_bits and current < region + regions:
        current = team.atomic_load(state, team.REGION) >> team.INSIDE_BITS


@njit(error_model="numpy")
def step(member, state, region, counts, late):
    """Each region's pieces add 1 to what the region before left: one that began too early would show as a wrong count.

    The last row of counts: how many regions each member entered. late: of each member the region before which it stays
    away, or NEVER, and for how many regions.
    """
    address, columns = address_of(counts), counts.shape[1]
    for i in range(REGIONS):
        if i == late[member, 0]:
            stay_away(state, region, late[member, 1])
        inside = team.enter(state, region, PIECES)
        if inside:
            team.atomic_add(address, REGIONS * columns + member, 1)
            piece = team.take(state, region)
            while piece < PIECES:
                if piece == 3:  # is long
                    for _ in range(300):
                        team.atomic_load(state, team.STOP)
                if i == 0 or counts[i - 1, piece] == 1:
                    team.atomic_add(address, i * columns + piece, 1)
                piece = team.take(state, region)
        region = team.leave(state, region, inside)


@entry
def serve(member, members, state, counts, late):
    region = 0
    while True:
        region = team.next_job(state, region)
        if region == 0:
            return
        step(member, state, region, counts, late)


@entry
def run(state, counts, late):
    step(0, state, team.start_job(state), counts, late)
    team.finish_job(state)


@pytest.fixture
def counts() -> np.ndarray:
    return np.zeros((REGIONS + 1, PIECES), np.int64)


def never_late(members: int) -> np.ndarray:
    return np.full((members, 2), NEVER)


@pytest.mark.parametrize("members", [1, 2, 3, 8, 33])
def test_every_piece_is_done_once(members, counts):
    late = never_late(members)
    threads = team.Team(members, serve, (counts, late))
    try:
        for jobs in range(20):
            counts[:] = 0
            run(threads.state, counts, late)
            assert (counts[:-1] == 1).all()
            assert counts[-1].max() <= REGIONS and counts[-1].sum() >= REGIONS and not counts[-1, members:].any()
            if jobs == 10:
                time.sleep(0.05)  # long enough that the members sleep
    finally:
        threads.stop()
    assert threading.active_count() < members + 10


@pytest.mark.parametrize("member", [0, 1])
@pytest.mark.parametrize(("before", "regions"), [(0, 1), (7, 1), (7, 20), (30, 1000)])
def test_the_others_go_on_without_a_member_that_is_late(member, before, regions, counts):
    late = never_late(3)
    # Member 0 ends the job, so it cannot be late for the end of it; the others can, and for the next job's beginning.
    late[member] = before, regions if member else min(regions, REGIONS - before)
    threads = team.Team(3, serve, (counts, late))
    try:
        for _ in range(20):
            counts[:] = 0
            run(threads.state, counts, late)
            assert (counts[:-1] == 1).all()
            assert counts[-1, member] <= REGIONS - min(regions, REGIONS - before)
    finally:
        threads.stop()


@entry
def take_all(state, region):
    while team.take(state, region) < PIECES:
        pass


@entry
def enter(state, region):
    return team.enter(state, region, PIECES)


@entry
def leave(state, region, inside):
    return team.leave(state, region, inside)


@entry
def start_job(state):
    return team.start_job(state)


@entry
def finish_job(state):
    team.finish_job(state)


@entry
def next_job(state, region):
    return team.next_job(state, region)


@pytest.fixture
def state() -> np.ndarray:
    return np.zeros(team.STATE_WORDS, np.int64)


@entry
def first_token(state, region, inside, job):
    return products.next_token(state, region, inside, job[0], np.int64(-1))


def test_who_is_late_prepares_nothing_whatever_the_next_job_is(state):
    job = np.zeros(1, layout.JOB)
    for tokens in (1, 2, layout.MAX_TOKENS):
        job[0]["tokens"] = tokens
        assert first_token(state.ctypes.data, 1, False, job) >= layout.MAX_TOKENS  # which no job exceeds


def test_a_region_is_over_when_its_pieces_are_taken_and_all_have_left(state):
    at = state.ctypes.data
    first = start_job(at)
    assert enter(at, first)
    take_all(at, first)
    assert not enter(at, first), "all pieces are taken"
    assert not enter(at, first + 1), "the region before is not over"
    assert leave(at, first, True) == first + 1
    assert not enter(at, first), "over"
    assert leave(at, first, False) == first + 1  # at once
    assert enter(at, first + 1) and enter(at, first + 1)
    assert take_all(at, first + 1) is None
    late = threading.Thread(target=leave, args=(at, first + 1, True))
    late.start()
    time.sleep(0.01)
    assert late.is_alive(), "one is inside still"
    assert leave(at, first + 1, True) == first + 2
    late.join()


@pytest.mark.parametrize("job", [0, 1, 2**35 - 1, 2**36 - 1])
def test_numbers_of_jobs_do_not_run_out(job, state):
    at = state.ctypes.data
    state[team.REGION] = np.uint64(job << (team.INDEX_BITS + team.INSIDE_BITS)).astype(np.int64)
    before = 0
    for _ in range(3):
        first = start_job(at)
        assert next_job(at, before) == first
        assert enter(at, first)
        take_all(at, first)
        assert leave(at, first, True) == first + 1
        finish_job(at)
        assert not enter(at, first + 1), "the job is over"
        before = first


def test_who_waits_for_a_job_is_told_of_the_end(state):
    state[team.STOP] = 1
    start_job(state.ctypes.data)
    assert next_job(state.ctypes.data, 0) == 0


def test_threads_that_cannot_be_started_leave_none_behind(counts, monkeypatch):
    start, started = threading.Thread.start, []

    def third_fails(thread):
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", third_fails)
    with pytest.raises(RuntimeError, match="new thread"):
        team.Team(4, serve, (counts, never_late(4)))
    assert len(started) == 2 and not any(thread.is_alive() for thread in started)


def test_a_team_that_waits_uses_no_cpu(counts):
    late = never_late(2)
    threads = team.Team(2, serve, (counts, late))
    try:
        run(threads.state, counts, late)
        time.sleep(0.1)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.25
    finally:
        threads.stop()


def test_a_process_ends_with_a_team_that_nobody_stopped():
    code = """
import numpy as np
from tests.kernels.cpu.test_team import never_late, run, serve, team
counts, late = np.zeros((51, 37), np.int64), never_late(3)
threads = team.Team(3, serve, (counts, late))
run(threads.state, counts, late)
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=dict(os.environ)
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
