"""Who runs and who waits."""

import pytest

from qcompile.serving.scheduler import QueueFullError, Scheduler


def test_first_come_first_served_within_slots() -> None:
    scheduler: Scheduler[str] = Scheduler(2, 3)
    scheduler.submit(["a", "b", "c"])
    assert scheduler.admit(9) == [(0, "a"), (1, "b")]
    assert scheduler.admit(9) == []
    scheduler.release(1)
    assert scheduler.admit(9) == [(1, "c")]
    assert (scheduler.running, scheduler.waiting) == (2, 0)


def test_a_request_is_queued_whole_or_not_at_all() -> None:
    scheduler: Scheduler[int] = Scheduler(1, 2)
    scheduler.submit([1, 2])
    with pytest.raises(QueueFullError):
        scheduler.submit([3, 4])
    assert scheduler.waiting == 2
    scheduler.submit([3])


def test_what_is_gone_leaves_queue_and_slots() -> None:
    scheduler: Scheduler[int] = Scheduler(1, 2)
    scheduler.submit([1, 2, 3])
    scheduler.admit(1)
    assert sorted(scheduler.sweep(lambda job: job != 2)) == [1, 3]
    assert scheduler.admit(1) == [(0, 2)]
    scheduler.release(0)
    assert not scheduler.busy
