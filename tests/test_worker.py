"""The background thread is waited for no longer than there is something to wait for."""

from __future__ import annotations

import queue
import threading
import time
from typing import Any

import pytest

from update_watch import worker as worker_file
from update_watch.worker import Sinks, Worker, rest, unhurried


class Torn(queue.SimpleQueue):  # type: ignore[type-arg]
    """An interrupt comes just before, or just after, an item is handed over."""

    def __init__(self, is_before: bool) -> None:
        self.is_before, self.is_torn = is_before, False

    def put(self, item: Any, *rest: Any) -> None:
        if self.is_torn or self.is_before:
            if not self.is_torn:
                self.is_torn = True
                raise KeyboardInterrupt
            super().put(item, *rest)
            return
        self.is_torn = True
        super().put(item, *rest)
        raise KeyboardInterrupt


def interrupted(is_before: bool) -> tuple[Worker, list[Any]]:
    handled: list[Any] = []
    worker = Worker("test", handled.append)
    worker._line.jobs = Torn(is_before)
    try:
        worker.put("first")
    except KeyboardInterrupt:
        return worker, handled
    raise AssertionError("no interrupt came")


def test_an_interrupt_before_an_item_is_handed_over_is_not_waited_for() -> None:
    worker, handled = interrupted(True)
    assert worker.wait(5.0) and handled == []
    assert worker.put("second") and worker.wait(5.0) and handled == ["second"]


def test_an_item_that_was_handed_over_before_an_interrupt_is_handled() -> None:
    worker, handled = interrupted(False)
    assert worker.wait(5.0) and handled == ["first"]


def test_a_long_job_is_waited_for_to_its_end() -> None:
    done, handled = threading.Event(), []

    def handle(item: str) -> None:
        done.wait(1.5)
        handled.append(item)

    worker = Worker("test", handle)
    worker.put("long")
    assert not worker.wait(0.6)
    worker.put("next")
    done.set()
    assert worker.wait(5.0) and handled == ["long", "next"]


def test_what_comes_after_the_end_was_asked_for_is_handled_in_order_by_no_second_thread_beside_the_first() -> None:
    go, at_once, handled = threading.Event(), [], []

    def handle(item: str) -> None:
        at_once.append(sum(thread.name == "update-watch ending" for thread in threading.enumerate()))
        go.wait(5.0)
        handled.append(item)

    worker = Worker("ending", handle)
    worker.put("first")
    worker.stop("last")
    worker.put("late")
    assert not worker.wait(0.05)
    go.set()
    assert worker.wait(5.0) and handled == ["first", "last", "late"] and at_once == [1, 1, 1]
    assert worker.wait(0.0) and worker.put("later still") and worker.wait(5.0)
    assert handled[-1] == "later still" and len(handled) == 4


def test_of_the_ranks_that_join_only_the_first_calls_what_it_was_given() -> None:
    class OnAll(list[Any]):
        on_every_rank = True
        __call__ = list.append

    is_first = False
    plain, on_all = [], OnAll()
    sinks = Sinks([plain.append, on_all], lambda: is_first)
    sinks("of another rank")  # type: ignore[arg-type]
    is_first = True
    sinks("of the first")  # type: ignore[arg-type]
    assert plain == ["of the first"] and on_all == ["of another rank", "of the first"]


# --- rests

ITEMS = 100


class Clock:
    """A millisecond passes with each look at it."""

    def __init__(self) -> None:
        self.now, self.rests = 0.0, 0

    def perf_counter(self) -> float:
        self.now += 0.001
        return self.now

    def sleep(self, seconds: float) -> None:
        self.rests += 1
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(worker_file, "time", found)
    return found


def worked(clock: Clock, is_awaited: bool) -> list[Any]:
    """What a worker's thread has gone through, while somebody waits for it or nobody does."""
    begin, seen, done = threading.Event(), [], threading.Event()

    def handle(items: range) -> None:
        begin.wait(10)
        seen.extend(unhurried(items))
        done.set()

    thread = Worker("test", handle)
    thread.put(range(ITEMS))
    waiting = threading.Thread(target=thread.wait)
    if is_awaited:
        waiting.start()
        while thread._line.jobs.empty():  # till it waits
            pass
    begin.set()
    assert done.wait(10)
    if is_awaited:
        waiting.join(10)
    thread.stop()
    return seen


def test_a_background_thread_rests_between_pieces_of_its_work(clock: Clock) -> None:
    assert worked(clock, is_awaited=False) == list(range(ITEMS))
    # 2 ms of work are two or three looks at the clock
    assert ITEMS / 4 <= clock.rests <= ITEMS / 2


def test_it_does_not_rest_while_somebody_waits_for_it(clock: Clock) -> None:
    assert worked(clock, is_awaited=True) == list(range(ITEMS))
    assert clock.rests == 0


def test_other_threads_never_rest(clock: Clock) -> None:
    assert list(unhurried(range(ITEMS))) == list(range(ITEMS))
    rest()
    assert clock.rests == 0 and clock.now == 0


def test_what_is_handed_over_last_is_waited_for_unless_something_before_it_is_stuck() -> None:
    stuck, handled = threading.Event(), list[str]()

    def handle(item: str) -> None:
        if item == "stuck":
            stuck.wait(20)
        time.sleep(0.05)
        handled.append(item)

    free = Worker("test", handle)
    free.stop("last", timeout=10.0)
    assert handled == ["last"]
    held = Worker("test", handle)
    held.put("stuck")
    begin = time.monotonic()
    held.stop("after it", timeout=10.0)
    assert time.monotonic() - begin < 5.0
    stuck.set()
    assert held.wait(10.0) and handled == ["last", "stuck", "after it"]
