"""Every cause planted in real training is found, and healthy twins are silent; see bench/scenarios.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from update_watch.report import Cause

_spec = importlib.util.spec_from_file_location("scenarios", Path(__file__).parents[1] / "bench" / "scenarios.py")
assert _spec is not None and _spec.loader is not None
scenarios = importlib.util.module_from_spec(_spec)
sys.modules["scenarios"] = scenarios  # dataclasses look their module up
_spec.loader.exec_module(scenarios)

pytestmark = pytest.mark.filterwarnings("ignore")  # torchao's, on import
NAMES = list(scenarios.SCENARIOS)


def mistakes(name: str, samples: int = 256, seed: int = 0, change: Callable[[Any], None] | None = None) -> list[str]:
    def build() -> Any:
        run = scenarios.SCENARIOS[name]()
        if change is not None:
            change(run)
        return run

    found: list[str] = scenarios.mistakes(*scenarios.play(build, samples, seed))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_what_was_planted_is_found_within_two_windows_and_nothing_else(name: str) -> None:
    assert mistakes(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("samples", [64, 1024])
@pytest.mark.parametrize("name", NAMES)
def test_few_and_many_samples_come_to_the_same_verdicts(name: str, samples: int) -> None:
    assert mistakes(name, samples, seed=1) == []


def test_every_cause_of_a_single_process_is_planted() -> None:
    planted = {cause for build in scenarios.SCENARIOS.values() for cause in build().planted.values()}
    # gradients summed in BF16 and replicas that differ have scenarios of their own, in their tests
    assert set(Cause) - planted == {Cause.accumulation_rounding, Cause.replicas_differ}


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("norms at one in bf16", lambda run: run.planted.update({"norm.weight": Cause.not_written})),
        ("norms at one in bf16", lambda run: run.planted.clear()),
        ("second moment that cannot decay", lambda run: run.planted.clear()),
        ("average kept in bf16", lambda run: run.planted.clear()),
        ("healthy fp32", lambda run: run.planted.update({"enter.weight": Cause.weight_rounding})),
        ("stall late in a decaying schedule", lambda run: setattr(run, "onset", 1)),
        ("all tensors stalled", lambda run: setattr(run, "ends", 2)),
    ],
)
def test_wrong_verdicts_would_be_seen(name: str, change: Callable[[Any], None]) -> None:
    assert mistakes(name, change=change)
