"""Random trainings with and without a watch (`bench/fuzz.py`): the same bits, no watch ended by an error of its own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

FUZZ = Path(__file__).resolve().parents[2] / "bench" / "fuzz.py"


def _bench() -> Any:
    spec = importlib.util.spec_from_file_location("fuzz", FUZZ)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("count", "seed"), [pytest.param(200, 0, marks=pytest.mark.slow, id="200"), pytest.param(3, 1000, id="3")]
)
def test_random_trainings_keep_every_bit_and_their_watch(count: int, seed: int) -> None:
    found = _bench().fuzz(count, seed)
    assert found["different"] == [] and found["problems"] == []
    assert found["ended_by_torch"] < 0.5 * count
