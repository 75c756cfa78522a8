"""bench/run_unchanged.py tells one changed bit, another drawn number and another verdict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench import run_unchanged


def stored(**weights: torch.Tensor) -> dict[str, Any]:
    return {"model": weights, "drawn": torch.zeros(4)}


def test_one_bit_is_told() -> None:
    one, other = torch.ones(3), torch.ones(3)
    other[1] = torch.nextafter(other[1], torch.tensor(2.0))
    assert run_unchanged.differing(stored(a=one, b=one), stored(a=one, b=one.clone())) == []
    assert run_unchanged.differing(stored(a=one, b=one), stored(a=one, b=other)) == ["b"]
    assert run_unchanged.differing(stored(a=torch.zeros(1)), stored(a=-torch.zeros(1))) == ["a"]
    assert run_unchanged.differing(stored(a=one), stored(a=one, b=one)) == ["b"]


def test_another_random_state_is_told() -> None:
    drawn = {**stored(), "drawn": torch.ones(4)}
    assert run_unchanged.differing(stored(), drawn) == ["random state"]


def test_another_verdict_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"w": ("healthy", "None"), "b": ("stalled", "weight_rounding")}

    def verdicts(journal: Path) -> dict[str, tuple[str, str]]:
        return found if journal.name == "run.jsonl" else {**found, "b": ("healthy", "None")}

    monkeypatch.setattr(run_unchanged, "train", lambda *_, **__: stored())
    monkeypatch.setattr(run_unchanged, "verdicts", verdicts)
    (line,) = run_unchanged.compare(Path("script.py"), "bf16")
    assert line.startswith("b: ('stalled', 'weight_rounding') under run")
    assert "1 healthy, 1 stalled" in capsys.readouterr().out


@pytest.mark.slow
def test_a_fit_of_lightning_is_the_same_under_run() -> None:
    assert run_unchanged.compare(run_unchanged.ROOT / "bench" / "unchanged" / "lightning_module.py", "bf16") == []
