"""What is said of a tensor's states is kept from window to window, and made anew where they are of other kinds."""

from __future__ import annotations

import pytest
import torch

import update_watch as uw
from update_watch.measure import row_facts
from update_watch.measure.row_facts import WindowFacts


def told(watch: uw.Watch, optimizer: torch.optim.Optimizer) -> list[dict[str, object]]:
    [watched] = watch._model.watched.values()
    [own] = watched._plan_of.blocks
    facts = WindowFacts(
        optimizer,
        watched._rates.facts(watched.groups, watched.groups, watched._used_groups, 0, watched.window_steps),
        "",
    ).facts_of(watched.cohorts, own.facts)()
    formats = [dict(zip(of.rows.tolist(), of.dtypes, strict=True)) for of in facts.states.values()]
    told = zip(facts.given["low_states"], facts.given["accumulators"], strict=True)
    return [
        {"low": low, "formats": tuple(of.get(i, "") for of in formats), "counters": [*counters]}
        for i, (low, counters) in enumerate(told)
    ]


def test_states_of_another_format_are_told_as_that(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [torch.nn.Parameter(torch.randn(20, 30).bfloat16()) for _ in range(3)]
    optimizer = torch.optim.AdamW(params, lr=1e-3)
    asked: list[str] = []
    count = row_facts._low_states
    monkeypatch.setattr(row_facts, "_low_states", lambda row, state: (asked.append(row.names[0]), count(row, state))[1])
    with uw.watch([(str(i), p) for i, p in enumerate(params)], optimizer, budget=None) as watch:
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
        first = told(watch, optimizer)
        assert first == told(watch, optimizer) == [{"low": 2, "formats": ("bfloat16",) * 2, "counters": []}] * 3
        assert sorted(asked) == ["0", "1", "2"]  # once each
        state = optimizer.state[params[1]]
        state["exp_avg"] = state["exp_avg"].float()
        optimizer.state[params[2]]["step"] = optimizer.state[params[2]]["step"].bfloat16()
        second = told(watch, optimizer)
    assert second[0] == first[0]
    assert second[1] == {"low": 1, "formats": ("float32", "bfloat16"), "counters": []}
    assert second[2]["counters"] == ["step"]
