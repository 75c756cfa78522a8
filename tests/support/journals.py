"""Journals of small reports."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from update_watch.dashboards.frame import Frame
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.report import Health, Report, TensorReport


def tiny(step: int, health: Health = Health.healthy, efficiency: float | None = 1.0, **fields: Any) -> Report:
    """A report of two tensors; the first has the given health."""
    text = "" if health is Health.healthy else f"Its efficiency is {efficiency}."
    first = TensorReport("a", health, advice=text, efficiency=efficiency, numel=8, lr=1e-3)
    second = TensorReport("b", Health.healthy, efficiency=0.99, numel=8, lr=1e-3)
    return Report(step, 10, health, f"step {step}", (first, second), time=float(step), **fields)


def write(path: Path, *reports: Report, **options: Any) -> Path:
    journal = Journal(path, **options)
    for report in reports:
        journal(report)
    journal.close()
    return path


def steps(path: Path) -> list[int]:
    return [report.step for report in read_journal(path)]


def environment() -> dict[str, str]:
    """For another process that imports this checkout."""
    return {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}


def is_close(a: Any, b: Any, path: str = "") -> bool:
    """Of plain data: to four digits, of headroom to four decimals."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(is_close(a[k], b[k], f"{path}.{k}") for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(is_close(x, y, path) for x, y in zip(a, b, strict=True))
    if isinstance(a, float):
        tolerance = 2e-4 if "headroom" in path else 6e-4 * abs(a)
        return b is not None and abs(a - b) <= tolerance
    return bool(a == b)


def assert_same_tensors(found: Frame, wanted: Frame, rtol: float = 0.0) -> None:
    """Verdicts, sentences, histograms alike, and numbers but for so much of themselves."""
    for key in ("headroom", "movement", "places"):
        np.testing.assert_array_equal(getattr(found, key), getattr(wanted, key))
    assert found.accumulators.keys() == wanted.accumulators.keys()
    for ours, theirs in [
        (found.tensors, wanted.tensors),
        *((found.accumulators[name], columns) for name, columns in wanted.accumulators.items()),
    ]:
        np.testing.assert_array_equal(ours.health, theirs.health)
        np.testing.assert_array_equal(ours.cause, theirs.cause)
        assert (dict(ours.advice), ours.dtype) == (dict(theirs.advice), theirs.dtype)
        for name, values in theirs.numbers.items():
            np.testing.assert_allclose(ours.numbers[name], values, rtol=rtol)
