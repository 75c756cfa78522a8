"""What is added up on the host does not wait for torch's other threads, and leaves their number as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import update_watch as uw
from update_watch.measure.device import one_thread
from update_watch.measure.device.one_thread import OnOneThread
from update_watch.measure.sums.host_sums import HostSums

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(one_thread.setter() is None, reason="torch does not ask OpenMP here")


@pytest.fixture(autouse=True)
def _three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_inside_there_is_one_thread_and_after_it_there_are_as_many_as_before() -> None:
    alone = OnOneThread(CPU)
    with alone, alone:
        assert torch.get_num_threads() == 1
        seen: list[int] = []
        other = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        other.start()
        other.join()
    assert seen == [3] and torch.get_num_threads() == 3


def test_an_error_inside_leaves_as_many_as_before() -> None:
    alone = OnOneThread(CPU)
    with pytest.raises(KeyboardInterrupt), alone, alone:
        raise KeyboardInterrupt
    assert torch.get_num_threads() == 3


def test_on_another_device_and_where_torch_does_not_obey_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    for alone in (OnOneThread(torch.device("cuda", 0)), OnOneThread(torch.device("meta"))):
        with alone, alone:
            assert torch.get_num_threads() == 3
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 5)
        assert one_thread.setter.__wrapped__() is None
    assert torch.get_num_threads() == 5  # that of the patch was put back
    torch.set_num_threads(3)


class Threads(TorchDispatchMode):
    """How many threads there are in each replay of the rule, and in each step of training."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "adam" in func._schema.name:
            self.seen.append((len(args[0]), torch.get_num_threads()))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("breaks", [False, True])
def test_rules_are_replayed_on_one_thread_and_training_steps_on_all(
    breaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = [torch.nn.Parameter(torch.randn(40, 30).bfloat16()) for _ in range(20)]
    optimizer = torch.optim.AdamW(params, lr=1e-3, fused=True)
    if breaks:
        monkeypatch.setattr(HostSums, "add", None)
    named, ops = [(str(i), p) for i, p in enumerate(params)], Threads()
    with uw.watch(named, optimizer, window=16, budget=None) as watch:
        for step in range(40):
            for p in params:
                p.grad = torch.randn_like(p)
            with ops if step > 1 else nullcontext():  # before that the rule is tried out
                optimizer.step()
            assert torch.get_num_threads() == 3
        assert (watch._tap.error is not None) == breaks
    training = {threads for count, threads in ops.seen if count == len(params)}
    replays = {threads for count, threads in ops.seen if count < len(params)}
    assert (training, replays) == ({3}, {1})
