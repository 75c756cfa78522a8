"""Judged side by side or one by one, tensors get the same verdicts, and histories the same ends."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import random
from typing import Any

import numpy as np
import pytest

from tests.support.evidence_samples import accumulator, histogram, numbers, tensor, verdict, window
from update_watch.evidence import TensorEvidence, changed
from update_watch.judge import diagnosis as module
from update_watch.judge.alerts import Alerts
from update_watch.judge.columns.accumulators import Verdicts as AccumulatorVerdicts
from update_watch.judge.columns.rests import Sorted, sort
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import Health, Report, TensorReport
from update_watch.thresholds import Thresholds

EFFICIENCIES = (0.99, 0.99, 0.86, 0.79, 0.5, 0.12, 0.09, 0.02, 0.0, -0.5, 3.0, None)


def some_tensor(rng: random.Random, i: int, course: float | None) -> TensorEvidence:
    """As trainings have them: mostly as in the window before, one thing or another odd."""

    def seldom(value: Any, usual: Any) -> Any:
        return value if rng.random() < 0.04 else usual

    efficiency = seldom(rng.choice(EFFICIENCIES), course)
    states: dict[str, Any] = {}
    for name in ("exp_avg", "exp_avg_sq", "weight_decay", "average:ema", "step"):
        if rng.random() < (0.1 if name in ("average:ema", "step") else 0.7):
            growth, decay, own = (rng.choice(EFFICIENCIES) for _ in range(3))
            states |= accumulator(
                name,
                numbers=numbers(own, displacement_efficiency=rng.choice([own, 0.05, 0.99, None])),
                growth=growth,
                decay=decay,
                dtype=seldom("float32", "bfloat16"),
                rate=rng.choice([0.1, 0.001, None]),
                value=256.0 if name == "step" else None,
                note=seldom("rounded", ""),
                reason=seldom("why", ""),
            )
    lr, undone = seldom(4e-3, seldom(1e-7, 1e-3)), seldom(rng.choice([0.9, 0.4]), 0.0)
    return tensor(
        efficiency,
        f"layers.{i // 5}.{'norm' if i % 5 == 1 else 'linear'}{i % 5}.weight",
        shape=(64,) if i % 5 == 1 else (64, 64),
        scheme=rng.choice(["plain"] * 6 + ["stochastic", "carried:exp_avg", "carried", "unknown"]),
        dtype=seldom("float64", "bfloat16"),
        optimizer_group=seldom("", "0/0"),
        trainable=seldom(False, True),
        requires_grad=seldom(False, True),
        is_resting=seldom(True, False),
        reason=seldom("why", ""),
        steps=seldom(0, 128),
        measured_steps=rng.choice([128, 16, 3, 1, 0]),
        gradless_steps=seldom(128, 0),
        skipped_steps=seldom(rng.choice([3, 128]), 0),
        zero_gradient_fraction=seldom(1.0, rng.choice([0.0, None])),
        finite=seldom(False, True),
        efficiency_error=rng.choice([0.0, 0.01, 0.04, 0.2, None]),
        displacement_efficiency=rng.choice([efficiency, 0.3, 0.95, None]),
        changed_fraction=rng.choice([0.0, 0.5]),
        applied_ratio=rng.choice([0.0, 1e-3]),
        headroom_histogram=rng.choice([None, histogram(-5), histogram(-1, 0, 1), histogram(4, 5)]),
        gradient_rms=seldom(1e-12, 1e-3),
        gradient_max=1e-2,
        stored=1.0,
        lr=lr,
        lr_max=rng.choice([lr, None]),
        lr_min=seldom(lr / 5, lr),
        state_factor=seldom(0.5, 1.0),
        undone_fraction=undone,
        net_efficiency=1 - undone,
        net_efficiency_error=rng.choice([0.0, 0.3, None]),
        written_steps=100 if undone else 0,
        is_put_back=undone > 0 and rng.random() < 0.5,
        held_fraction=seldom(0.25, None),
        was_rounded=seldom(True, False),
        accumulators=states,
    )


def some_run(seed: int, windows: int = 8, count: int = 40) -> list[list[TensorEvidence]]:
    rng = random.Random(seed)
    courses = [rng.choice(EFFICIENCIES) for _ in range(count)]
    found = []
    for _ in range(windows):
        courses = [rng.choice(EFFICIENCIES) if rng.random() < 0.05 else course for course in courses]
        found.append([some_tensor(rng, i, course) for i, course in enumerate(courses) if rng.random() < 0.97])
    return found


def judged(windows: list[list[TensorEvidence]], resumed: int | None = None) -> tuple[list[Report], dict[str, Any]]:
    """All reports with alerts, and what is remembered in the end."""
    diagnosis, alerts, found = Diagnosis(Thresholds()), Alerts(Thresholds(), clock=lambda: 1e9), []
    for k, tensors in enumerate(windows):
        if k == resumed:
            state = json.loads(json.dumps(diagnosis.state_dict(), allow_nan=False))
            diagnosis = Diagnosis(Thresholds())
            diagnosis.load_state_dict(state)
        found.append(alerts.update(diagnosis.judge(window(*tensors, step=128 * (k + 1)))))
    return found, diagnosis.state_dict()


def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on nobody is judged side by side."""

    def nobody(*arguments: Any) -> Sorted:
        found = sort(*arguments)
        return found._replace(rests=np.zeros_like(found.rests), scored=np.zeros_like(found.scored))

    monkeypatch.setattr(module, "sort", nobody)
    monkeypatch.setattr(AccumulatorVerdicts, "_are_alone", lambda self, _: np.ones(len(self.places), bool))


def rounded(value: Any) -> Any:
    """To twelve digits: the same sums, taken in another order."""
    if isinstance(value, float):
        return float(f"{value:.12g}")
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    return [rounded(one) for one in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize("seed", range(12))
def test_side_by_side_as_one_by_one(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = some_run(seed)
    if seed % 2:  # what stands while nobody looks is not kept over a resume, after which all are looked at
        windows = [[changed(tensor, is_resting=False) for tensor in tensors] for tensors in windows]
    reports, state = judged(windows, resumed=5 if seed % 2 else None)
    alone(monkeypatch)
    others, other_state = judged(windows)
    for report, other in zip(reports, others, strict=True):
        assert rounded(report.to_dict()) == rounded(other.to_dict())
    assert rounded(state) == rounded(other_state)


def test_most_tensors_are_judged_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    shares = []

    def seen(*arguments: Any) -> Sorted:
        found = sort(*arguments)
        shares.append(float((found.rests | found.scored).mean()))
        return found

    monkeypatch.setattr(module, "sort", seen)
    states = accumulator("exp_avg_sq", 0.99, rate=0.001)
    courses = [0.99, 0.5, 0.02]
    tensors = [tensor(courses[i % 3], f"b{i}.w", accumulators=states) for i in range(30)]
    tensors += [tensor(None, f"frozen{i}.w", trainable=False, changed_fraction=0.0) for i in range(10)]
    reports, _ = judged([tensors] * 3)
    assert shares == [1.0] * 3
    assert reports[-1].counts["stalled"] == reports[-1].counts["stalling"] == reports[-1].counts["frozen"] == 10


# --- fields that are made when they are asked for --------------------------------------------------


def one(**fields: Any) -> TensorReport:
    return verdict(tensor(0.02, accumulators=accumulator("exp_avg", rate=0.1), **fields))


def test_late_fields_are_as_any_others() -> None:
    found = one()
    whole = TensorReport(**{field.name: getattr(one(), field.name) for field in dataclasses.fields(found)})
    assert one() == whole
    assert repr(one()) == repr(whole)
    assert pickle.loads(pickle.dumps(one())) == copy.copy(one()) == copy.deepcopy(one()) == whole
    assert dataclasses.replace(one(), health=Health.idle) == dataclasses.replace(whole, health=Health.idle)
    assert found.advice
    assert list(vars(whole)) == list(vars(found))  # asked for one, all are there
    assert TensorReport("a", Health.healthy).advice == TensorReport.advice == ""


def test_what_is_pickled_of_a_report_is_plain() -> None:
    (report,), _ = judged([[tensor(0.02), tensor(0.99, "b.w", numbers=numbers(0.99))]])
    read = pickle.loads(pickle.dumps(report))
    assert read == report
    assert type(read.tensors) is tuple
