"""Whose handler of SIGTERM and SIGHUP is in place while watches are open. How a process ends by the signal: test_faults.py."""

from __future__ import annotations

import gc
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest
import torch
from torch import nn

import update_watch as uw

DEFAULT = signal.SIG_DFL


@pytest.fixture(autouse=True)
def default_handler() -> Iterator[None]:
    uw.close_all()  # what other tests left open keeps the handler,
    gc.collect()  # and so does what they interrupted while it was closed
    before = {number: signal.signal(number, DEFAULT) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, kept in before.items():
        signal.signal(number, kept)


def watch() -> uw.Watch:
    net = nn.Linear(4, 4).bfloat16()
    return uw.watch(net, torch.optim.SGD(net.parameters(), lr=0.1))


def handler() -> object:
    return signal.getsignal(signal.SIGTERM)


def test_the_handler_is_there_while_a_watch_is_open_and_the_default_after_the_last() -> None:
    first = watch()
    ours = handler()
    assert ours is not DEFAULT and ours == DEFAULT  # frameworks that look for an earlier handler find none
    second = watch()
    first.close()
    assert handler() is ours
    second.close()
    assert handler() is DEFAULT


def test_each_signal_has_its_handler_where_nobody_has_set_one() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    with watch():
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN and handler() is not DEFAULT
    signal.signal(signal.SIGHUP, DEFAULT)
    with watch():
        assert signal.getsignal(signal.SIGHUP) is handler() is not DEFAULT
    assert signal.getsignal(signal.SIGHUP) is DEFAULT


def test_a_handler_set_after_the_watch_wins_and_stays_when_the_watch_is_closed() -> None:
    caught: list[int] = []

    def theirs(number: int, frame: FrameType | None) -> None:
        caught.append(number)

    with watch() as one:
        signal.signal(signal.SIGTERM, theirs)
        os.kill(os.getpid(), signal.SIGTERM)
        assert caught == [signal.SIGTERM]  # and the process lives
        assert not one._closed
        with watch():  # one that is made later does not take it back
            assert handler() is theirs
    assert handler() is theirs


@pytest.mark.parametrize("theirs", [signal.SIG_IGN, lambda number, frame: None], ids=["ignored", "handled"])
def test_a_handler_set_before_the_watch_is_left_alone(theirs: signal.Handlers) -> None:
    signal.signal(signal.SIGTERM, theirs)
    with watch():
        assert handler() is theirs
    assert handler() is theirs


def test_the_default_set_after_the_watch_is_the_plain_default() -> None:
    with watch():
        signal.signal(signal.SIGTERM, DEFAULT)
        assert handler() is DEFAULT


def test_a_watch_made_in_another_thread_sets_no_handler() -> None:
    made: list[uw.Watch] = []
    thread = threading.Thread(target=lambda: made.append(watch()))
    thread.start()
    thread.join()
    assert handler() is DEFAULT
    made[0].close()
