"""What is reported can be chosen by name; everything is watched all the same."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

import update_watch as uw


def train(steps: int = 32, **options: Any) -> uw.Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 1)).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    with uw.watch(model, optimizer, window=steps, **options) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            model(torch.randn(4, 8).bfloat16()).float().square().mean().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None
    return report


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, ["0.weight", "0.bias", "1.weight", "1.bias", "2.weight", "2.bias"]),
        ({"include": "*.weight"}, ["0.weight", "1.weight", "2.weight"]),
        ({"include": ["0.*", "2.bias"]}, ["0.weight", "0.bias", "2.bias"]),
        ({"exclude": ["*bias", "1.*"]}, ["0.weight", "2.weight"]),
        ({"include": "[01].*", "exclude": "*.bias"}, ["0.weight", "1.weight"]),
    ],
    ids=["all", "one-pattern", "two", "excluded", "both"],
)
def test_reports_hold_the_chosen_tensors_with_the_same_numbers(options: dict[str, Any], names: list[str]) -> None:
    whole, report = train(), train(**options)
    assert [t.name for t in report.tensors] == names
    by_name = {t.name: t for t in whole.tensors}
    assert [t.efficiency for t in report.tensors] == [by_name[name].efficiency for name in names]


def test_alerts_and_headline_know_nothing_of_the_others() -> None:
    told = train(exclude="1.*")
    assert told.health is uw.Health.stalled
    assert told.alerts and not any(name.startswith("1.") for alert in told.alerts for name in alert.tensors)
    assert "1.weight" not in told.headline


def test_patterns_that_fit_nothing_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="update_watch"):
        assert train(include="nothing.*").tensors == ()
    assert caplog.text.count("leave none of the 6 tensors") == 1


@pytest.mark.parametrize("name", ["include", "exclude"])
def test_patterns_that_are_no_texts_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=rf"watch\({name}=\[1\]\): expected a name with wildcards"):
        train(**{name: [1]})
