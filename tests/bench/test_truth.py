"""The comparison behind `bench/truth.py`: what it counts, worked by hand; and a regime from end to end."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from bench import truth
from bench.shared.full_comparison import Exact, FullComparison
from bench.shared.regimes import QUICK, REGIMES, SPREAD
from bench.shared.verdict_check import VerdictCheck
from update_watch.report import Cause, Health, TensorReport


@pytest.fixture
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("update_watch")
    level = logger.level
    yield
    logger.setLevel(level)


# --- all elements -----------------------------------------------------------------------------------------


def _compared(steps: list[list[float]], dtype: torch.dtype = torch.bfloat16) -> dict[str, Exact]:
    """SGD on two tensors, [1, 1] and [4], by updates that are given: first those of the one, then that of the other."""
    named = [
        ("one", nn.Parameter(torch.ones(2, dtype=dtype))),
        ("four", nn.Parameter(torch.full((1,), 4.0, dtype=dtype))),
    ]
    optimizer = torch.optim.SGD([p for _, p in named], lr=1.0)
    comparison = FullComparison(named, [optimizer], ["sgd"])
    for a, b, c in steps:
        named[0][1].grad = -torch.tensor([a, b], dtype=dtype)
        named[1][1].grad = -torch.tensor([c], dtype=dtype)
        with comparison.step():
            optimizer.step()
    return comparison.close_window()


def test_what_is_lost_is_counted_tensor_by_tensor() -> None:
    kept, lost = 2.0**-7, 2.0**-9  # of 1 in BF16: one gap, a quarter of one
    found = _compared([[kept, lost, 0.0], [kept, lost, 4 * kept]])
    want = 2 * (kept**2 + lost**2)
    assert found["one"].efficiency == pytest.approx(2 * kept**2 / want)
    assert (found["one"].wanted, found["one"].lost, found["one"].nonzero) == (4, 2, 4)
    assert found["one"].lost_fraction == 0.5
    assert found["one"].displacement_efficiency == pytest.approx(4 * kept**2 / (4 * kept**2 + 4 * lost**2))
    assert found["one"].update_ratio == pytest.approx((want / (3 + (1 + kept) ** 2)) ** 0.5)
    assert (found["four"].efficiency, found["four"].wanted, found["four"].lost) == (1.0, 1, 0)
    whole = _compared([[kept, lost, 0.0]], torch.float32)["one"]
    assert whole.efficiency == pytest.approx(1.0) and whole.lost == 0


def test_windows_add() -> None:
    found = Exact(dot=1, want=2, path=1, meant=4) + Exact(dot=2, want=2, path=2, meant=2)
    assert (found.efficiency, found.displacement_efficiency, found.update_ratio) == (0.75, 0.5, None)


def test_a_parameter_without_a_gradient_is_refused() -> None:
    p = nn.Parameter(torch.ones(2))
    comparison = FullComparison([("p", p)], [torch.optim.SGD([p], lr=1.0)], ["sgd"])
    with pytest.raises(ValueError, match="no gradient"), comparison.step():
        pass


# --- verdicts ---------------------------------------------------------------------------------------------


def _check(window: int, *said: tuple[Health, float], cause: Cause | None = Cause.weight_rounding) -> list[str]:
    """What is said to each (health, true efficiency) in turn."""
    check = VerdictCheck(window)
    return [check.add(TensorReport("w", health, cause), Exact(dot=e, want=1.0, nonzero=1.0)) for health, e in said]


def test_a_verdict_is_wrong_when_the_truth_lies_beyond_its_limit() -> None:
    healthy, stalling, stalled = Health.healthy, Health.stalling, Health.stalled
    assert _check(128, (healthy, 0.78), (healthy, 0.73)) == ["", ""]  # 0.755 over both
    assert _check(128, (healthy, 0.76), (healthy, 0.73)) == ["", "healthy"]
    assert _check(128, (healthy, 0.70)) == ["healthy"]
    assert _check(128, (stalling, 0.84)) == [""] and _check(128, (stalling, 0.86)) == ["accused"]
    assert _check(128, (stalling, 0.5), (stalling, 0.92)) == ["", ""]  # not yet past its exit
    assert _check(128, (stalled, 0.2)) == ["accused"] and _check(128, (stalled, 0.14)) == [""]
    assert _check(128, (Health.idle, 0.5), cause=Cause.zero_gradient) == ["idle"]
    assert _check(128, (Health.unknown, 0.0)) == [""]
    assert _check(128, (stalled, 0.99), cause=Cause.state_rounding) == [""]  # not of the weight


def test_what_was_pooled_excuses_a_verdict_for_two_windows_or_128_steps() -> None:
    told = [(Health.healthy, 1.6), *[(Health.healthy, 0.0)] * 3]
    assert _check(128, *told) == ["", "", "healthy", "healthy"]
    assert _check(8, (Health.healthy, 0.0), *[(Health.healthy, 1.0)] * 5) == ["healthy", "", "", "", "", ""]


# --- the table --------------------------------------------------------------------------------------------


def _reading(off: float, error: float | None, tensor: str = "w", window: int = 0, **fields: object) -> truth.Reading:
    return dataclasses.replace(
        truth.Reading(tensor, window, "healthy", 0.9, error, off, 0.0, 0.0, 0.0, ""),
        **fields,  # type: ignore[arg-type]
    )


def test_a_line_counts_what_the_errors_cover() -> None:
    readings = [
        _reading(0.1, 0.05),
        _reading(-0.1, 0.04, "v", health="unknown"),
        _reading(0.0, 0.0, "v", 1, wrong="healthy"),
        _reading(0.02, 0.0, "w", 1, wrong="idle"),
        _reading(0.03, None, "w", 2, ratio_off=-0.5),
    ]
    line = truth.summary(readings, 32)
    assert line["readings"] == line["compared"] == 5
    assert line["bias"] == pytest.approx(0.01)
    assert (line["off_95"], line["off_max"], line["ratio_95"]) == (0.1, 0.1, 0.5)
    assert line["cover"] == 0.5 and line["false_zero"] == 1
    assert (line["false_healthy"], line["false_accused"], line["unknown"]) == (1, 1, 0.2)
    assert (line["first_median"], line["first_max"], line["never"]) == (48, 64, 0)
    assert len(truth.missed("x", line)) == 1  # the false 0; too few readings for the rest
    assert len(truth.missed("x", {**line, "compared": 200, "bias": -0.02})) == 3
    assert truth.missed("x", {**line, "compared": 200, "bias": 0.0, "cover": 0.95, "false_zero": 0}) == []
    assert "1" in truth.text("x", line)


def test_the_table_of_the_docs_rounds_what_a_line_says() -> None:
    line = truth.summary([_reading(0.0004, 0.01), _reading(-0.02, 0.001, "v", wrong="healthy", ratio_error=0.1)], 128)
    said = truth.markdown("x", line)
    assert said == "| x | 2 | -0.010 | 0.020 | 0.020 | 0.50 | 1 | 0 | 0, 1.00 |"
    assert truth.MARKDOWN_HEAD.splitlines()[0].count("|") == said.count("|")


def test_regimes_are_found_by_words_and_the_quick_ones_exist() -> None:
    assert set(QUICK) <= set(REGIMES)
    assert truth.chosen([], True) == list(QUICK)
    assert len(truth.chosen([], False)) == len(REGIMES) > 50
    assert truth.chosen(["muon"], True) == ["muon, 13 tensors", "muon, 68 tensors", "muon, 298 tensors"]


@pytest.mark.parametrize("name", ["adamw, 13 tensors", "muon, 13 tensors", "momentum, experts that starve"])
def test_a_regime_trains_and_counts_its_tensors(name: str) -> None:
    torch.manual_seed(0)
    training = REGIMES[name].make(1, 4)
    for t in range(2):
        training.gradients(t)
        training.step()
    count = len(list(training.model.parameters()))
    assert "tensors" not in name or count == int(name.split()[1])
    assert all(bool(p.isfinite().all()) for p in training.model.parameters())
    assert len(SPREAD) == len(set(SPREAD)) == 5


@pytest.mark.slow
@pytest.mark.usefixtures("_quiet")
def test_a_regime_read_whole_is_exact_from_end_to_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    readings = truth.measure(dataclasses.replace(REGIMES["adamw, 13 tensors"], window=32, windows=2, samples=10_000), 0)
    assert len(readings) == 26
    assert max(abs(r.off or 0.0) for r in readings) < 0.005
    assert not any(r.wrong for r in readings)
    monkeypatch.setattr(sys, "argv", ["truth.py", "--only", "no such regime"])
    with pytest.raises(SystemExit):
        truth.main()
    assert "no regime has this in its name" in capsys.readouterr().err
