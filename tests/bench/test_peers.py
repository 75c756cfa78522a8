"""The README's table of peers is what its script prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench import peers

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
COMMAND = "python bench/peers.py"


def readme_rows() -> list[list[str]]:
    lines = README.partition(COMMAND)[2].partition("\n## ")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]


def test_the_readme_has_a_row_for_each_way_and_a_column_for_each_training() -> None:
    head, _, *rows = readme_rows()
    assert head == ["", *peers.TRAININGS, peers.COST]
    assert [row[0] for row in rows] == list(peers.WAYS)


@pytest.mark.slow
def test_what_the_readme_says_of_ways_that_need_no_package_is_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("optimi")
    own = {name: way for name, way in peers.WAYS.items() if not way[1]}
    monkeypatch.setattr(peers, "WAYS", own)
    rows, missing = peers.table(128, 0, 1)
    assert missing == [] and rows == [row[:-1] for row in readme_rows()[2:] if row[0] in own]


def test_a_cost_is_what_a_way_adds_to_a_step_whatever_the_machine_does_beside_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, pace = 0.0, 1.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds * pace

    class Slowing(peers.Training):
        def backward(self) -> None:
            nonlocal pace
            pace *= 1.02  # ever slower: what is always second would look dearer
            work(0.01)

        def step(self) -> None:
            work(0.004)

    monkeypatch.setattr(peers.time, "perf_counter", lambda: now)
    monkeypatch.setattr(peers, "Training", Slowing)
    monkeypatch.setattr(peers, "_model", lambda width, blocks: torch.nn.Linear(1, 1))
    low, middle, high = peers.cost(lambda training: (lambda: None, lambda: work(0.008), lambda: None), False, 12, 1)
    assert low <= middle <= high and middle == pytest.approx(2.0, rel=0.05)
