"""Every cause planted in real training is found, and healthy twins are silent; see bench/scenarios.py."""

from __future__ import annotations

import dataclasses
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import bench.planted.run as kit
import bench.planted.truth as truths
from bench import scenarios
from update_watch.report import Cause, Health, TensorReport

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's, on import
NAMES: list[str] = list(scenarios.SCENARIOS)
QUICK: list[str] = scenarios.chosen("", quick=True)


def mistakes(name: str, samples: int = 256, seed: int = 0, change: Callable[[Any], None] | None = None) -> list[str]:
    def build() -> Any:
        run = scenarios.SCENARIOS[name]()
        if change is not None:
            change(run)
        return run

    found: list[str] = scenarios.mistakes(*scenarios.play(build, samples, seed))
    return found


@pytest.mark.parametrize("name", QUICK)
@pytest.mark.slow
def test_what_was_planted_is_found_within_two_windows_and_nothing_else(name: str) -> None:
    assert mistakes(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("samples", [64, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_few_and_many_samples_come_to_the_same_verdicts(name: str, samples: int) -> None:
    assert mistakes(name, samples, seed=1) == []


def test_every_cause_of_a_single_process_is_planted_in_the_quick_ones_too() -> None:
    for names in (NAMES, QUICK):
        sick = [name for name in names if not name.startswith("healthy")]
        planted = {cause for name in sick for cause in scenarios.SCENARIOS[name]().planted.values()}
        # replicas that differ take two processes: tests/test_ranks.py
        assert set(Cause) - planted == {Cause.replicas_differ}


def _plant(**planted: Cause) -> Callable[[Any], None]:
    return lambda run: run.planted.update({name.replace("__", "."): cause for name, cause in planted.items()})


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("norms at one in bf16", _plant(norm__weight=Cause.not_written), "missed not_written of norm.weight"),
        ("norms at one in bf16", lambda run: run.planted.clear(), "norm.weight called weight_rounding"),
        (
            "norms at one in bf16",
            lambda run: run.planted.clear(),
            "not healthy: norm.weight: of what was meant, only 0",
        ),
        ("norms at one in bf16", lambda run: run.planted.clear(), "false alarm 'STALLED: 1 of 20 tensors"),
        ("second moment that cannot decay", lambda run: run.planted.clear(), "exp_avg_sq called state_rounding"),
        ("average kept in bf16", lambda run: run.planted.clear(), "weight/average:ema: of what was meant, only 0"),
        ("healthy fp32", _plant(enter__weight=Cause.weight_rounding), "weight_rounding of enter.weight is not there"),
        ("healthy fp32", _plant(enter__weight=Cause.weight_rounding), "weight_rounding of enter.weight is no longer"),
        ("stall late in a decaying schedule", lambda run: setattr(run, "onset", 1), "missed weight_rounding of"),
        ("all tensors stalled", lambda run: setattr(run, "ends", 2), "window 2: enter.weight called weight_rounding"),
    ],
)
@pytest.mark.slow
def test_wrong_verdicts_and_wrong_scenarios_would_be_seen(name: str, change: Callable[[Any], None], said: str) -> None:
    assert any(said in line for line in mistakes(name, change=change))


def test_a_verdict_that_stays_away_is_a_mistake() -> None:
    def without_verdicts(report: Any) -> Any:
        tensors = tuple(TensorReport(t.name, Health.unknown) for t in report.tensors)
        return dataclasses.replace(report, tensors=tensors, alerts=())

    run, reports, truth = scenarios.play(scenarios.SCENARIOS["healthy fp32"], 64, 0)
    found = scenarios.mistakes(run, [without_verdicts(report) for report in reports], truth)
    assert found == [f"last window: {name} is unknown" for name in ("enter.weight", "norm.weight", "leave.weight")]
    assert scenarios.mistakes(run, reports[:-1], truth) == ["3 reports of 4 windows"]


def test_every_verdict_on_a_weight_is_held_against_the_full_comparison() -> None:
    run, reports, truth = scenarios.play(scenarios.SCENARIOS["norms at one in bf16"], 64, 0)

    def changed(name: str, health: Health) -> list[str]:
        def other(report: Any) -> Any:
            tensors = [dataclasses.replace(t, health=health) if t.name == name else t for t in report.tensors]
            return dataclasses.replace(report, tensors=tuple(tensors))

        found: list[str] = scenarios.mistakes(run, [other(report) for report in reports], truth)
        return found

    assert changed("norm.weight", reports[-1].tensors[1].health) == []
    assert any("norm.weight called healthy, and only [0." in line for line in changed("norm.weight", Health.healthy))
    run.planted["enter.weight"] = Cause.weight_rounding
    reports = [
        dataclasses.replace(
            r, tensors=tuple(dataclasses.replace(t, cause=Cause.weight_rounding) for t in r.tensors), alerts=()
        )
        for r in reports
    ]
    for health in (Health.stalled, Health.stalling):
        said = f"window 2: enter.weight called {health}, and ["
        assert any(
            line.startswith(said) and line.endswith("of what was meant arrived")
            for line in changed("enter.weight", health)
        )


# --- the full comparison ----------------------------------------------------------------------------------


def _followed(dtype: torch.dtype, steps: list[float], weight: float = 1.0) -> Any:
    """The full comparison of SGD on two equal weights, by updates that are given."""
    p = nn.Parameter(torch.full((2,), weight, dtype=dtype))
    optimizer = torch.optim.SGD([p], lr=1.0)

    def step(t: int) -> None:
        p.grad = torch.full((2,), -steps[t], dtype=dtype)
        optimizer.step()

    run = kit.Run([("w", p)], optimizer, step, rule="sgd")
    truth = truths.Truth(run)
    for t in range(len(steps)):
        with truth.step(t):
            run.step(t)
    return truth


def test_the_full_comparison_counts_what_is_lost() -> None:
    # half a step of BF16 at 1 is 2^-8: the first is kept, the second lost
    truth = _followed(torch.bfloat16, [2.0**-7, 2.0**-9])
    assert truth.over("w", [1]).efficiency == pytest.approx(16 / 17)
    assert truth.over("w", [1]).displacement == pytest.approx(4 / 5)
    assert not truth.confirms("w", Cause.weight_rounding, 1)
    assert _followed(torch.bfloat16, [1.5 * 2.0**-7]).over("w", [1]).efficiency == pytest.approx(4 / 3)  # rounded up
    lost = _followed(torch.bfloat16, [2.0**-9] * 4)
    assert lost.over("w", [1]).arrived == 0.0
    assert lost.confirms("w", Cause.weight_rounding, 1) and not lost.confirms("w", Cause.not_written, 1)
    assert lost.onset("w") == 1 and truth.onset("w") == 2
    assert lost.unhealthy() == ["w: of what was meant, only 0.000 arrived"]


def test_the_full_comparison_of_fp32_finds_nothing() -> None:
    truth = _followed(torch.float32, [2.0**-9] * 40)
    assert truth.over("w", [1, 2]).arrived == pytest.approx(1.0)
    assert truth.unhealthy() == [] and truth.onset("w") == 3
    causes = [cause for cause in Cause if cause is not Cause.replicas_differ]
    assert [cause for cause in causes if truth.confirms("w", cause, 2)] == []


# --- the tables -------------------------------------------------------------------------------------------


@pytest.fixture
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("update_watch")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.mark.usefixtures("_quiet")
def test_the_table_counts_planted_by_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", "norms at one in bf16", "--samples", "64", "--seeds", "2"]
    monkeypatch.setattr(sys, "argv", ["scenarios.py", *arguments])
    assert scenarios.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[-5:-3]] == [["nothing", ".", "12"], ["weight_rounding", "2", "."]]
    assert lines[-3].split() == ["a", "weight_rounding", "b", "healthy"]
    assert lines[-1].startswith("2 runs of 1 scenarios, 14 tensors and accumulators, 72 verdicts: 0 wrong, in 0 runs;")


@pytest.mark.usefixtures("_quiet")
def test_a_wrong_verdict_is_told_counted_and_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> Any:
        run = scenarios.SCENARIOS["norms at one in bf16"]()
        run.planted = {"enter.weight": Cause.not_written}
        return run

    monkeypatch.setattr(scenarios, "SCENARIOS", {"wrong": wrong, **scenarios.SCENARIOS})
    monkeypatch.setattr(sys, "argv", ["scenarios.py", "--only", "wrong", "--samples", "64"])
    assert scenarios.main() == 1
    text = capsys.readouterr().out
    assert "wrong (samples 64, seed 0): missed not_written of enter.weight: ['healthy', 'healthy']" in text
    assert re.search(r"^wrong +0 +1$", text, re.MULTILINE)
    table = text[text.index("planted (rows)") :].splitlines()
    assert [line.split() for line in table[2:4]] == [["nothing", "1", "5"], ["not_written", ".", "1"]]


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--seeds", "0"], "--seeds and --jobs must be 1"), (["--only", "xyz"], "no scenario has")]
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["scenarios.py", *arguments])
    with pytest.raises(SystemExit):
        scenarios.main()
    assert said in capsys.readouterr().err
