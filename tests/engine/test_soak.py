"""Thousands of random events on the scheduler over a toy backend; `tools/soak.py` does the same for longer."""

from tests.engine.toy_soak import toy_soak


def test_random_events_leave_nothing_behind() -> None:
    soak = toy_soak(seed=1)
    soak.run(20_000)
    soak.finish()
    counts = soak.counts
    for what in ("stop", "length", "interrupted", "timeout", "full", "preempted", "rolled", "QueueTimeout", "reused"):
        assert counts[what] >= 5, (what, counts)


def test_schedulers_that_fail_or_are_closed_are_replaced() -> None:
    soak = toy_soak(seed=2)
    for _ in range(10):
        for happens in (soak.fail, soak.close):
            for _ in range(8):
                soak.add()
            soak.step()
            happens()
            soak.step()
    soak.finish()
    assert soak.counts["BackendError"] >= 10 and soak.counts["SchedulerClosed"] >= 10
