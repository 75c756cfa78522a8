"""Rows of an embedding that are put back after each step, and the few that are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

import update_watch as uw
from update_watch.report import Cause, Health, Report

ROWS, PLACEHOLDER = 2000, 77


class Words(nn.Module):
    """An embedding in front of a head that is not trained; `is_tied`: of which every row has a gradient."""

    def __init__(self, is_tied: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(ROWS, 32)
        self.head = nn.Linear(32, 16).requires_grad_(False)
        self.is_tied = is_tied

    def loss(self, tokens: torch.Tensor) -> torch.Tensor:
        said = self.words(tokens).mean(1).tanh()
        if self.is_tied:
            return nn.functional.cross_entropy(said @ self.words.weight.T, tokens[:, 0])
        return (self.head(said) - 1).square().mean()


def run(is_kept: bool, is_tied: bool = False) -> list[Report]:
    """All rows are put back after each step, as they were; `is_kept`: but that of the placeholder."""
    model, reports = Words(is_tied), list[Report]()
    optimizer = torch.optim.AdamW(model.words.parameters(), lr=5e-4, weight_decay=1e-2)
    first = model.words.weight.detach().clone()
    is_put_back = torch.ones(ROWS, dtype=torch.bool)
    is_put_back[PLACEHOLDER] = not is_kept
    with uw.watch(model, optimizer, window=16, sinks=[reports.append]):
        for _ in range(5 * 16):
            tokens = torch.randint(0, 40, (4, 6))
            tokens[:, 2] = PLACEHOLDER
            optimizer.zero_grad()
            model.loss(tokens).backward()
            optimizer.step()
            with torch.no_grad():
                model.words.weight[is_put_back] = first[is_put_back]
    return reports


def test_textual_inversion_is_no_alarm_and_no_all_clear() -> None:
    reports = run(is_kept=True)
    assert not [alert for report in reports for alert in report.alerts]
    for report in reports[1:]:
        (t,) = [t for t in report.tensors if t.name == "words.weight"]
        assert (t.health, t.cause) == (Health.unknown, Cause.overwritten)
        assert "textual inversion" in t.advice


def test_an_embedding_that_has_gradients_everywhere_and_is_put_back_as_a_whole_is_overwritten() -> None:
    report = run(is_kept=False, is_tied=True)[-1]
    (t,) = [t for t in report.tensors if t.name == "words.weight"]
    assert (t.health, t.cause) == (Health.stalled, Cause.overwritten)


# --- sparse gradients, of which no step is replayed ------------------------------------------------


def run_sparse(
    rule: Callable[[Any], Optimizer], rows: int, tokens: int, is_put_back: bool, kept: int = 0
) -> list[Report]:
    """`kept`: so many rows, of which every batch has one, are left alone."""
    torch.manual_seed(0)
    words, head, reports = nn.Embedding(rows, 32, sparse=True), torch.randn(32, 16), list[Report]()
    optimizer, first = rule(words.parameters()), words.weight.detach().clone()
    with uw.watch(words, optimizer, window=16, sinks=[reports.append], budget=None):
        for _ in range(4 * 16):
            used = torch.randint(0, tokens, (16, 6))
            used[:, 0] = 0
            optimizer.zero_grad()
            (words(used).mean(1).tanh() @ head - 1).square().mean().backward()
            optimizer.step()
            if is_put_back:
                with torch.no_grad():
                    words.weight[kept:] = first[kept:]
    return reports


SPARSE: list[Any] = [
    pytest.param(lambda params: torch.optim.SparseAdam(list(params), lr=1e-3), id="sparse adam"),
    pytest.param(lambda params: torch.optim.SGD(params, lr=0.1), id="sgd"),
]


@pytest.mark.parametrize("rule", SPARSE)
def test_an_embedding_of_sparse_gradients_that_is_put_back_as_a_whole_is_overwritten(
    rule: Callable[[Any], Optimizer],
) -> None:
    put_back, trained = (run_sparse(rule, 400, 400, is_put_back) for is_put_back in (True, False))
    assert {(r.tensors[0].health, r.tensors[0].cause) for r in put_back[1:]} == {(Health.stalled, Cause.overwritten)}
    assert {(r.tensors[0].health, r.tensors[0].cause) for r in trained} == {(Health.unknown, Cause.not_replayable)}


@pytest.mark.parametrize("rule", SPARSE)
def test_textual_inversion_with_sparse_gradients_is_no_accusation(rule: Callable[[Any], Optimizer]) -> None:
    for report in run_sparse(rule, ROWS, 40, True, kept=1):
        assert report.tensors[0].health is Health.unknown
