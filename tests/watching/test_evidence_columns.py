"""A window's evidence as columns says of every tensor what it says when it is asked for that one."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import update_watch as uw
from update_watch.columns.evidence_columns import Columns, OneByOne, columns_of
from update_watch.columns.products import product
from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence, median_headroom
from update_watch.measure.ledger.reading import Reading
from update_watch.measure.sums.measured_block import median_headrooms, values_of
from update_watch.measure.window_evidence import Window, read
from update_watch.report import HEADROOM_BINS, PLACES
from update_watch.watching.selection import Selection

NUMBERS = [f"numbers.{name}" for name in Numbers._fields]
FIELDS = [
    field.name
    for field in dataclasses.fields(TensorEvidence)
    if field.name
    not in ("numbers", "accumulators", "what_if", "headroom_histogram", "movement_histogram", "movement_places")
]


@pytest.fixture(scope="module")
def window() -> Window:
    """Of 24 tensors in three formats: some of them starve, are frozen, belong to nobody, or are written to between steps."""
    torch.manual_seed(3)
    formats = (torch.bfloat16, torch.float32, torch.float16)
    params = [nn.Parameter((torch.randn(12, 10) * 10.0 ** -(i % 3)).to(formats[i % 3])) for i in range(24)]
    params[5].requires_grad_(False)
    optimizer = torch.optim.AdamW(params[:20], lr=1e-2, weight_decay=0.5)
    found: list[Any] = []
    with uw.watch([(f"t{i}", p) for i, p in enumerate(params)], optimizer, budget=None, window=16) as watch:
        watch._judge._handle = found.append
        for _ in range(32):
            for i, p in enumerate(params):
                p.grad = None if i == 7 or not p.requires_grad else torch.randn_like(p)
            optimizer.step()
            with torch.no_grad():
                params[2].copy_(params[2] * 0.9)
        watch._judge.wait()
        watch._judge._handle = lambda _: None
    return found[1]


def same(found: list[Any], expected: list[Any]) -> None:
    assert [(type(a), a) for a in found] == [(type(a), a) for a in expected]


def test_columns_are_what_the_tensors_are(window: Window) -> None:
    evidence = read(window)
    columns, tensors = columns_of(evidence.tensors), list(evidence.tensors)
    assert [t.name for t in tensors] == [f"t{i}" for i in range(24)]
    plain = Columns([OneByOne(tensors)])
    for name in FIELDS + NUMBERS:
        same(columns.raw(name), plain.raw(name))
        if name.startswith("numbers.") or not isinstance(columns.raw(name)[0], (str, tuple)):
            np.testing.assert_array_equal(columns.column(name), plain.column(name))
    for name in ("headroom_histogram", "movement_histogram"):
        np.testing.assert_array_equal(columns.histogram(name, HEADROOM_BINS), plain.histogram(name, HEADROOM_BINS))
    np.testing.assert_array_equal(
        columns.histogram("movement_places", PLACES), plain.histogram("movement_places", PLACES)
    )
    measured = [t for t in tensors if t.measured_steps]
    assert len(measured) >= 18
    assert all(abs(sum(t.headroom_histogram or ()) - 1) < 1e-9 for t in measured)


@pytest.mark.parametrize("patterns", [["*"], ["t1*", "t3"]])
def test_accumulators_are_what_those_of_the_tensors_are(window: Window, patterns: list[str]) -> None:
    tensors = Selection(patterns).of(read(window)).tensors
    found, expected = columns_of(tensors).parts(), Columns([OneByOne(list(tensors))]).parts()
    assert list(found) == list(expected) == ["exp_avg", "exp_avg_sq", "weight_decay"]
    parts = [f"{part}.{name}" for part in ("numbers", "growth", "decay") for name in Numbers._fields]
    for name, part in found.items():
        order, other = np.argsort(part.rows), expected[name]
        assert part.rows[order].tolist() == other.rows.tolist()
        for field in [*parts, *(f for f in AccumulatorEvidence._fields if f not in ("numbers", "growth", "decay"))]:
            values = part.values.raw(field)
            same([values[i] for i in order.tolist()], other.values.raw(field))


def test_the_ledger_says_of_all_what_it_says_of_one(window: Window, monkeypatch: pytest.MonkeyPatch) -> None:
    found = list(read(window).tensors)
    of_all = Reading.of_all

    def nobody(self: Reading, *arguments: Any) -> Any:
        columns, alone = of_all(self, *arguments)
        return columns, np.ones_like(alone)

    monkeypatch.setattr(Reading, "of_all", nobody)
    assert found == list(read(window).tensors)
    assert sum(t.written_steps > 0 for t in found) == 1
    assert sum(t.written_between == 0 for t in found) >= 20


def test_medians_of_histograms_are_those_of_each() -> None:
    rng = np.random.default_rng(1)
    counts_nB = np.where(rng.random((64, HEADROOM_BINS)) < 0.2, rng.integers(1, 9, (64, HEADROOM_BINS)), 0).astype(
        float
    )
    counts_nB[0], counts_nB[1], counts_nB[2, 0] = 0.0, np.eye(HEADROOM_BINS)[0], 100.0
    expected = [median_headroom(row) for row in counts_nB.tolist()]
    assert values_of(median_headrooms(counts_nB)) == expected
    assert expected[0] is None


def test_what_is_selected_is_taken_as_columns(window: Window) -> None:
    evidence = read(window)
    kept = Selection(["t1*"], ["t11"]).of(evidence)
    assert [t.name for t in kept.tensors] == ["t1", "t10", *(f"t{i}" for i in range(12, 20))]
    assert kept.tensors[1:3] == (evidence.tensors[10], evidence.tensors[12])
    nothing = Selection(["none"]).of(WindowEvidence(1, 1, ()))
    assert len(nothing.tensors) == 0


@pytest.mark.parametrize("rows", [0, 1, 32, 75])
def test_a_product_in_pieces_is_the_product(rows: int) -> None:
    rng = np.random.default_rng(rows)
    a_nX, b_XS = rng.random((rows, 128)), rng.random((128, 17))
    np.testing.assert_allclose(product(a_nX, b_XS), a_nX @ b_XS, rtol=1e-13)
