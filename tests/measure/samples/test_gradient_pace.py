"""How large gradients are beside those of the steps before: of tensors that differ, of trainings that vary, of odd gradients."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from update_watch.measure.device.gradient_pace import GradientPace
from update_watch.measure.device.host_memory import HostBlocks
from update_watch.measure.sampling import Sampler

SHAPE = (50, 64)


class Paced:
    """Twelve tensors of which every step has gradients of a size."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16, shape: tuple[int, ...] = SHAPE) -> None:
        torch.manual_seed(0)
        self.params = [nn.Parameter(torch.randn(shape).to(dtype)) for _ in range(12)]
        pace = GradientPace.of(self.params, random.Random(0))
        assert pace is not None
        self.pace = pace

    def step(
        self, size: float, of: Callable[[int], float] = lambda i: 1.0, make: Callable[[Tensor], Any] = Tensor.clone
    ) -> bool:
        for i, p in enumerate(self.params):
            p.grad = make((torch.randn(p.shape) * 1e-3 * size * of(i)).to(p.dtype))
        return self.pace.is_unlike()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_gradients_of_another_size_are_seen(dtype: torch.dtype) -> None:
    paced = Paced(dtype)
    seen = [paced.step(30.0 if step in (20, 40, 41) else 1.0) for step in range(60)]
    # in the first ones nobody knows what is usual
    assert [step for step, is_unlike in enumerate(seen) if is_unlike] == [*range(8), 20, 40, 41]


def test_what_says_nothing_is_passed_over() -> None:
    paced = Paced()
    for _ in range(10):
        paced.step(1.0)
    assert not paced.step(30.0, make=torch.zeros_like)
    assert not paced.step(30.0, make=lambda grad: None)
    assert not paced.step(30.0, make=lambda grad: grad.t().contiguous().t())  # not where the weight's elements are
    assert not paced.step(1.0, make=lambda grad: grad.where(torch.rand(grad.shape) < 0.7, 0.0))
    assert paced.step(30.0, make=lambda grad: grad.where(torch.rand(grad.shape) < 0.7, 0.0))


def test_gradients_that_cannot_be_read_here_are_not_asked_for() -> None:
    few = [nn.Parameter(torch.randn(4, 4)) for _ in range(20)]
    strided = [nn.Parameter(torch.randn(50, 128)[:, ::2]) for _ in range(20)]
    assert GradientPace.of(few, random.Random(0)) is None
    assert GradientPace.of(strided, random.Random(0)) is None
    assert GradientPace.of([nn.Parameter(torch.randn(SHAPE).double()) for _ in range(12)], random.Random(0)) is None


def test_tensors_of_other_sizes_are_each_taken_by_their_own() -> None:
    """Half of them 1,000 times the others: the median of all elements together lies between the two, where nothing is."""
    paced = Paced()
    seen = [paced.step(30.0 if step == 150 else 1.0, lambda i: 1e-3 if i % 2 else 1.0) for step in range(200)]
    assert [step for step, is_unlike in enumerate(seen) if is_unlike] == [*range(8), 150]


def test_those_without_a_gradient_change_nothing() -> None:
    paced = Paced()
    for step in range(60):
        for i, p in enumerate(paced.params):
            is_there = (i + step) % 3 > 0
            p.grad = (torch.randn(SHAPE) * (1e-5 if i < 6 else 1e-1)).bfloat16() if is_there else None
        assert paced.pace.is_unlike() == (step < 8), step


@pytest.mark.parametrize("kind", ["alternate", "normal", "grow"])
def test_of_steps_that_are_all_unlike_a_tenth_is_asked_for(kind: str) -> None:
    paced, sizes = Paced(), random.Random(0)
    size = {
        "alternate": lambda step: 30.0 if step % 2 else 1.0,
        "normal": lambda step: 2 ** sizes.gauss(0, 2),
        "grow": lambda step: 1e-3 * 1.5 ** (step % 40),
    }[kind]
    seen = [paced.step(size(step)) for step in range(408)]
    assert 4 <= sum(seen[8:]) <= 0.1 * 400 + 8


def test_the_largest_are_asked_for_where_many_are_large() -> None:
    paced, sizes = Paced(), random.Random(1)
    octaves = [sizes.gauss(0, 2) for _ in range(600)]
    seen = [paced.step(2**octave) for octave in octaves]
    asked = [octave for octave, is_unlike in zip(octaves[100:], seen[100:], strict=True) if is_unlike]
    assert np.mean(asked) > 3 and len(asked) > 20


def test_infinite_gradients_hide_no_others() -> None:
    paced = Paced(torch.float32)
    seen = [paced.step(float("inf") if step == 20 else 30.0 if step == 24 else 1.0) for step in range(40)]
    assert [step for step, is_unlike in enumerate(seen) if is_unlike] == [*range(8), 20, 24]


def test_a_training_that_has_blown_up_is_not_asked_for_in_every_step() -> None:
    paced = Paced()
    seen = [paced.step(float("nan") if step >= 20 else 1.0) for step in range(120)]
    assert seen[20] and sum(seen[20:]) < 0.1 * 100 + 2 * 8


def test_only_what_a_gradient_holds_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight of one dimension that was cut: its gradient has the same stride, and less."""
    from update_watch.measure.device import host_memory

    paced, read, ends = Paced(shape=(4000,)), host_memory.read, list[int]()

    def checked(places: np.ndarray, size: int) -> np.ndarray:
        grads: list[Tensor] = [p.grad for p in paced.params if p.grad is not None]
        held = [(g.data_ptr(), g.data_ptr() + g.numel() * g.element_size()) for g in grads]
        for address in (places - host_memory.at(np.zeros(1, np.int64))).ravel().tolist():
            assert any(begin <= address and address + size <= end for begin, end in held)
        ends.append(len(places))
        return read(places, size)

    monkeypatch.setattr(host_memory, "read", checked)
    for step in range(20):
        if step == 12:
            for p in paced.params[:6]:
                p.grad, p.data = None, p.data[:64].clone()
        paced.step(1.0)
    assert ends == [8] * 12 + [4] * 8


def test_a_shorter_tensor_in_anothers_place_is_not_read_beyond_its_end() -> None:
    """Rows taken away in mid-window: it lies in memory as the longer one did, but for its end."""
    paced = Paced()
    members = paced.params
    blocks = HostBlocks.of([Sampler(p.detach(), 256, 2) for p in members], [p.detach() for p in members])
    assert blocks is not None
    for _ in range(10):
        paced.step(1.0)
    places = blocks.places(0, 1 << 31)
    assert blocks.read([p.detach() for p in members], places) is not None
    for p in members:
        p.grad, p.data = None, p.data[:10].clone()
    usual = dict(paced.pace._usual)
    assert not paced.step(30.0) and paced.pace._usual == usual
    assert blocks.read([p.detach() for p in members], places) is None
