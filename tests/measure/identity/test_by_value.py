"""Masters that nothing marks: told by values, by their order where values are those of many, or as parts of a flat tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from tests.support.watch_nets import backward, batches
from update_watch.measure.identity.by_value import flats_of, pairs_of
from update_watch.report import Cause, Health


class Deep(nn.Module):
    """Three norms of ones between matrices, a bias of zeros behind each."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.layers = nn.Sequential(*[nn.Sequential(nn.Linear(48, 48), nn.RMSNorm(48)) for _ in range(3)])
        for layer in self.layers:
            nn.init.zeros_(layer[0].bias)  # type: ignore[index]
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


def matrices_first(model: nn.Module) -> list[nn.Parameter]:
    """As groups with and without decay have them."""
    return sorted(model.parameters(), key=lambda p: -p.dim())


def master(p: Tensor) -> Tensor:
    return p.detach().float().clone().requires_grad_()


def named(model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> list[str]:
    names = {id(p): name for name, p in model.named_parameters()}
    return [names[id(param)] for _, param in pairs]


def test_where_all_of_one_kind_have_masters_their_order_tells() -> None:
    model = Deep()
    params = matrices_first(model)
    pairs = pairs_of([master(p) for p in params], list(model.parameters()))
    assert [param is p for (_, param), p in zip(pairs, params, strict=True)] == [True] * 9


def test_a_part_of_a_kind_is_told_by_what_lies_around_it() -> None:
    model = Deep()
    params = list(model.parameters())
    pairs = pairs_of([master(p) for p in params[3:]], params)
    assert [param is p for (_, param), p in zip(pairs, params[3:], strict=True)] == [True] * 6
    # one norm, of which three are alike: which it is cannot be told
    pairs = pairs_of([master(params[0]), master(params[2]), torch.randn(3)], params)
    assert named(model, pairs) == ["layers.0.0.weight"]
    # the masters of the two others are known
    taken = {id(params[5]), id(params[8])}
    pairs = pairs_of([master(params[0]), master(params[2])], params, taken)
    assert named(model, pairs) == ["layers.0.0.weight", "layers.0.1.weight"]


def flat_of(params: list[nn.Parameter], padding: int = 0) -> Tensor:
    return torch.cat([*(p.detach().float().flatten() for p in params), torch.zeros(padding)]).requires_grad_()


@pytest.mark.parametrize("padding", [0, 100])
def test_what_lies_in_a_flat_tensor_is_told_by_its_values(padding: int) -> None:
    model = Deep()
    params = matrices_first(model)
    flat = flat_of(params, padding)
    ((found, held),) = flats_of([torch.randn(7), flat], list(model.parameters()))
    assert found is flat and [param is p for (_, param), p in zip(held, params, strict=True)] == [True] * 9
    assert [start for start, _ in held][:4] == [0, 2304, 4608, 6912]


def test_a_flat_tensor_that_is_not_wholly_known_is_none() -> None:
    params = list(Deep().parameters())
    unknown = torch.cat([flat_of(params), torch.randn(50)])
    ones = flat_of([params[1], params[2]])  # a bias and a norm, as any model has
    assert flats_of([unknown, ones, torch.zeros(500), flat_of(params[:1])], params) == []
    assert [flat is ones for flat, _ in flats_of([ones, flat_of(params[3:])], params)] == [False, True]


def separate(model: nn.Module) -> tuple[list[Tensor], Callable[[], None], Callable[[], None]]:
    params = matrices_first(model)
    masters = [master(p) for p in params]

    def feed() -> None:
        for m, p in zip(masters, params, strict=True):
            assert p.grad is not None
            m.grad = p.grad.float()

    def copy() -> None:
        for m, p in zip(masters, params, strict=True):
            p.copy_(m)

    return masters, feed, copy


def in_one(model: nn.Module) -> tuple[list[Tensor], Callable[[], None], Callable[[], None]]:
    params = matrices_first(model)
    flat = flat_of(params, 10)

    def feed() -> None:
        grads = [p.grad.float().flatten() for p in params if p.grad is not None]
        flat.grad = torch.cat([*grads, torch.zeros(10)])

    def copy() -> None:
        start = 0
        for p in params:
            p.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()

    return [flat], feed, copy


@pytest.mark.parametrize("kind", [separate, in_one])
@pytest.mark.parametrize("is_given", [True, False])
@pytest.mark.parametrize("copies", [True, False])
def test_masters_in_another_order_or_in_one_tensor_are_measured_and_told_where_they_are_not_copied(
    kind: Any, is_given: bool, copies: bool
) -> None:
    model = Deep()
    stepped, feed, copy = kind(model)
    optimizer = torch.optim.AdamW(stepped, lr=1e-3, weight_decay=0.0)
    with uw.watch(model, optimizer if is_given else None, window=16) as watch:
        for x in batches(32, torch.bfloat16):
            model.zero_grad()
            backward(model, x)
            feed()
            optimizer.step()
            if copies:
                with torch.no_grad():
                    copy()
        report = watch.flush()
    assert report is not None
    expected = (Health.healthy, None) if copies else (Health.stalled, Cause.not_copied_back)
    assert {t.name: (t.health, t.cause) for t in report.tensors} == {
        name: expected for name, _ in model.named_parameters()
    }
