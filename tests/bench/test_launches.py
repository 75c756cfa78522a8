"""Launches of a step on a GPU, counted without one: the bars of `bench/launches.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[2] / "bench" / "launches.py"


def counted(tmp_path: Path, tensors: int) -> dict[str, float]:
    """In a process of its own: the script makes the CPU pass for a GPU."""
    path = tmp_path / "launches.json"
    command = [sys.executable, str(SCRIPT), "--tensors", str(tensors), "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert path.exists(), done.stdout + done.stderr
    found: dict[str, float] = json.loads(path.read_text())[str(tensors)]
    return found


@pytest.mark.parametrize("tensors", [68, pytest.param(3000, marks=pytest.mark.slow)])
def test_a_step_adds_a_few_launches_however_many_tensors_there_are(tmp_path: Path, tensors: int) -> None:
    found = counted(tmp_path, tensors)
    assert 1 <= found["ordinary"] <= 4
    assert found["ordinary"] < found["mean"] <= 8
