"""The kernel of sums, in Triton's interpreter, against torch's way on the same steps."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernel of sums needs Triton")
os.environ["TRITON_INTERPRET"] = "1"

from tests.support.made_up_steps import CPU, KINDS, added
from update_watch.measure.device import multi_gather
from update_watch.measure.sums import kernel_sums
from update_watch.measure.sums.device_sums import DeviceSums
from update_watch.measure.sums.kernel_sums import KernelSums


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(multi_gather, "_interpreted", True)
    monkeypatch.setattr(kernel_sums, "_works", {CPU: True})
    yield
    assert kernel_sums._works[CPU]  # else torch's way was compared with itself


def compare(*given: Any, **options: Any) -> None:
    found, wanted = (added(given[0], way, *given[1:], **options) for way in (KernelSums, DeviceSums))
    assert all(bool(one.ne(0).any()) for one in wanted if one.numel())
    for i, (one, other) in enumerate(zip(found, wanted, strict=True)):
        assert kernel_sums.are_close(one, other), (i, (one - other).abs().max())


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "sampled" else pytest.mark.slow, id=n) for n in KINDS]
)
def test_sums_are_those_of_torchs_way(name: str) -> None:
    compare(KINDS[name], masked=name != "no-states-no-way", turns=2 if name == "no-states-no-way" else 1)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter is numpy
@pytest.mark.parametrize("planted", [float("nan"), float("inf")])
def test_what_is_no_number_spoils_what_it_spoils_in_torchs_way(planted: float) -> None:
    compare(KINDS["sampled"], planted)


def test_counts_and_places_of_the_histogram_are_the_same_to_the_last() -> None:
    found, wanted = (added(KINDS["both-in-fp64"], way) for way in (KernelSums, DeviceSums))
    whole = wanted[0].eq(wanted[0].round()) & wanted[0].ne(0)
    assert whole.sum() > 40 and torch.equal(found[0][whole], wanted[0][whole])
    assert torch.equal(found[0].ne(0), wanted[0].ne(0))


@pytest.mark.parametrize(
    ("kernel", "at"), [("add_steps", 10), pytest.param("pack_window", 8, marks=pytest.mark.slow)]
)  # its parts, its cells
def test_a_kernel_that_adds_otherwise_is_not_used_and_that_is_said_once(
    kernel: str, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = KINDS["both-in-fp64"]
    monkeypatch.setattr(kernel_sums, "_works", {})
    assert kernel_sums.is_right(CPU, kind) and kernel_sums._works == {CPU: True}
    run = kernel_sums.launch

    def wrong(name: str, grid: Any, given: Any, compiled_for: Any) -> None:
        run(name, grid, given, compiled_for)
        if name == kernel:
            given[at].mul_(1.0001)

    monkeypatch.setattr(kernel_sums, "launch", wrong)
    monkeypatch.setattr(kernel_sums, "_works", {})
    with pytest.warns(UserWarning, match="kernel of sums is not used") as said:
        assert not kernel_sums.is_right(CPU, kind)
        assert not kernel_sums.is_right(CPU, kind)
    assert sum("kernel of sums" in str(one.message) for one in said) == 1  # an old Triton has its own to say
    monkeypatch.setattr(kernel_sums, "_works", {CPU: True})


def test_where_it_fails_in_a_step_torchs_way_adds_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_sums, "launch", None)
    with pytest.warns(UserWarning, match="kernel of sums is not used") as said:
        found = added(KINDS["sampled"], KernelSums)
    assert len(said) == 1
    assert all(torch.equal(a, b) for a, b in zip(found, added(KINDS["sampled"], DeviceSums), strict=True))
    monkeypatch.setattr(kernel_sums, "_works", {CPU: True})
