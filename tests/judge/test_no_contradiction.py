"""No sentence contradicts a number beside it: every combination of the numbers of a row is judged and read again."""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.evidence_samples import tensor, window
from update_watch.evidence import TensorEvidence
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import Cause, Health, TensorReport
from update_watch.thresholds import Thresholds
from update_watch.wording import fixed

VALUES: dict[str, tuple[Any, ...]] = {
    "efficiency": (None, 0.0, 0.05, 0.5, 0.95, 1.6, -0.5),
    "applied_ratio": (None, 0.0, 1e-4),
    "moved": (None, 0.0, 1e-3),
    "written_between": (None, 1e-4),
    "zero_gradient_fraction": (None, 0.3, 1.0),
    "gradless_steps": (0, 128),
    "trainable": (True, False),
    "requires_grad": (True, False),
    "optimizer_group": ("0/0", ""),
    "lr_max": (None, 0.0, 1e-3),
    "reason": ("", "its rule draws random numbers"),
}


def row(values: dict[str, Any]) -> TensorEvidence:
    values = dict(values)
    efficiency = values.pop("efficiency")
    lost = None if efficiency is None else min(max(1 - efficiency, 0.0), 1.0)
    return tensor(efficiency, lost=lost, changed_fraction=None, lr=values["lr_max"], lr_min=values["lr_max"], **values)


def alike(stride: int) -> Iterator[list[TensorEvidence]]:
    """Rows, in lists of those that cannot change what is said of each other: whether an optimizer moves anything does.

    With a stride of 5, which divides none of the numbers of values, all triples of values are still met.
    """
    for moved in VALUES["moved"]:
        others = (values if name != "moved" else (moved,) for name, values in VALUES.items())
        chosen = itertools.islice(itertools.product(*others), None, None, stride)
        yield [
            dataclasses.replace(row(dict(zip(VALUES, one, strict=True))), name=f"blocks.{i}.weight")
            for i, one in enumerate(chosen)
        ]


def contradictions(t: TensorReport, e: TensorEvidence) -> list[str]:
    """What of a verdict and its sentence the numbers of its row do not bear out."""
    text, found = t.advice, []
    moves = bool(e.applied_ratio or e.moved or e.written_between)
    claims = {
        "is at rest and moves": t.health in (Health.idle, Health.frozen)
        and moves
        and t.cause is not Cause.negligible_gradient,
        "is healthy and was not measured": t.health is Health.healthy and t.efficiency is None,
        "is healthy and stalls": t.health is Health.healthy and not 0.8 <= (t.efficiency or 0.0) <= 2.5,
        "is stalled and arrives": t.health is Health.stalled
        and t.cause is Cause.weight_rounding
        and (moves if t.efficiency is None else t.efficiency >= 0.1),
        "is stalling and does not": t.health is Health.stalling and not 0.1 <= (t.efficiency or 0.0) < 0.8,
        "says that it moves": "yet it moves" in text and not moves,
        "does not say that it moves": t.health is Health.healthy and t.cause is not None and "yet it moves" not in text,
        "says that its gradient was None": "gradient was None" in text and e.gradless_steps < e.steps,
        "says that its gradients were 0": "gradients were 0" in text and e.zero_gradient_fraction != 1.0,
        "says that its rate was 0": "learning rate was 0" in text and e.lr_max != 0,
        "says that nobody holds it": "no optimizer" in text.lower() and bool(e.optimizer_group),
        "says that it is frozen": "requires_grad is False" in text and e.trainable and e.requires_grad,
        "says why it is unknown": (t.health is Health.unknown) != text.startswith("Unknown, because "),
        "has no sentence": not text and t.health is not Health.healthy,
    }
    found += [claim for claim, is_wrong in claims.items() if is_wrong]
    for number in re.findall(r"efficiency (-?\d+\.\d\d)", text):
        if number != fixed(t.efficiency):
            found.append(f"says efficiency {number}")
    return found


def judged(evidence: list[TensorEvidence], windows: int) -> Iterator[tuple[TensorReport, TensorEvidence]]:
    diagnosis = Diagnosis(Thresholds())
    for i in range(windows):
        report = diagnosis.judge(window(*evidence, step=128 * (i + 1)))
    return zip(report.tensors, evidence, strict=True)


ALL = [pytest.param(windows, 1, marks=pytest.mark.slow) for windows in (1, 3)]


@pytest.mark.parametrize(("windows", "stride"), [(1, 5), *ALL])
def test_no_combination_of_the_numbers_of_a_row_contradicts_its_sentence(windows: int, stride: int) -> None:
    wrong: dict[str, TensorEvidence] = {}
    for rows in alike(stride):
        for verdict, evidence in judged(rows, windows):
            for claim in contradictions(verdict, evidence):
                wrong.setdefault(claim, evidence)
    assert wrong == {}


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.fixed_dictionaries({name: st.sampled_from(values) for name, values in VALUES.items()}),
        min_size=1,
        max_size=6,
    )
)
def test_no_course_of_windows_leaves_rest_where_something_moves(course: list[dict[str, Any]]) -> None:
    diagnosis = Diagnosis(Thresholds())
    for i, values in enumerate(course):
        evidence = row(values)
        found = diagnosis.judge(window(evidence, step=128 * (i + 1))).tensors[0]
        # of several windows together an efficiency is another than that of the last alone, which may have none
        earlier = ("stall", "efficiency", "was not measured")
        about_now = [c for c in contradictions(found, evidence) if not any(word in c for word in earlier)]
        assert about_now == []


def test_meta_a_contradiction_is_seen() -> None:
    evidence = row({name: values[0] for name, values in VALUES.items()} | {"efficiency": 0.95, "applied_ratio": 1e-4})
    ((verdict, _),) = judged([evidence], 1)
    assert contradictions(verdict, evidence) == []
    assert contradictions(dataclasses.replace(verdict, health=Health.idle, advice="It rests."), evidence)
    assert contradictions(dataclasses.replace(verdict, advice="BF16 loses it (efficiency 0.12)."), evidence)
    assert contradictions(dataclasses.replace(verdict, efficiency=0.3), evidence)
