"""Whole windows on an accelerator, proven without one: nothing is read or copied in a step, one vector leaves at the end."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "fake_window.py"
# what a gather is made of
GATHER = ("as_strided", "select", "slice", "stack", "cat", "copy_", "view", "expand")


@functools.cache
def run(count: int, implementation: str, *extras: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(count), implementation, *extras], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def beyond_gathers(ops: dict[str, float]) -> float:
    return sum(n for name, n in ops.items() if name.split(".")[1] not in GATHER)


def in_every_window(ops: dict[str, float]) -> float:
    """Without the look at each tensor's whole gradient, once in its life: `any`, what adds it up, and two views of it."""
    return beyond_gathers(ops) - 4 * ops["aten.any.default"]


CASES = [
    pytest.param("fused", ("then-read",), id="fused"),
    pytest.param("foreach", (), id="foreach", marks=pytest.mark.slow),
    pytest.param("fused", ("none", "overflow"), id="fused-gaps-overflow", marks=pytest.mark.slow),
    pytest.param("capturable", ("none",), id="capturable-gaps", marks=pytest.mark.slow),
    pytest.param("fused", ("accumulate",), id="fused-accumulate", marks=pytest.mark.slow),
    pytest.param("sgd", (), id="sgd", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("implementation", "extras"), CASES)
def test_a_window_reads_nothing_and_copies_only_its_sums_at_its_end(
    implementation: str, extras: tuple[str, ...]
) -> None:
    found = run(20, implementation, *extras)
    assert found["error"] == ""  # a host read of a fake tensor raises
    assert found["reasons"] == []  # inside a replay it would be a reason of a row
    assert found["inside"] == {}
    assert found["windows"] == 2
    assert found["ends"] == [{"aten.copy_.default": 1}] * 2  # all cohorts' sums and the overflows in one vector
    assert found["ops"]["aten.sum.dim_IntList"] > 0  # it did measure
    assert found["shadow_steps"] >= 31  # states in FP32 ran along
    assert found["looked"] == (8 if "accumulate" in extras else 0)
    # the decay's replay too, where the rule rounds decay apart (fused rules do not)
    assert found["decay"] == (implementation == "foreach")
    if "then-read" in extras:  # a host read, planted: it would be seen
        assert "DataDependentOutput" in found["planted"]


@pytest.mark.slow
def test_operators_per_step_do_not_grow_with_the_number_of_parameters() -> None:
    few, many = (in_every_window(run(count, "fused")["ops"]) for count in (60, 120))
    assert many == pytest.approx(few, rel=0.03)
    assert 10 < many < 120


@pytest.mark.slow
def test_a_planted_copy_is_seen() -> None:
    assert run(20, "fused", "copy")["inside"] == {"aten._to_copy.default": 30}
