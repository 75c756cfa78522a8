"""Whatever evidence comes, judging neither raises nor varies, and what is idle warns nobody."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.evidence_samples import (
    STILL,
    accumulator,
    histogram,
    numbers,
    tensor,
    verdict,
    window,
)
from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence
from update_watch.judge.alerts import Alerts
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import HEADROOM_BINS, Health, Level, Report
from update_watch.thresholds import Thresholds

# --- whatever comes --------------------------------------------------------------------------------

ODD = (None, None, 0.0, 1.0, 0.05, 0.5, 0.85, 0.99, -1.0, 3.0, 1e-30, 1e300, float("nan"), float("inf"), -float("inf"))
COUNTS = (0, 1, 5, 16, 128)


def some_numbers(rng: random.Random) -> Numbers:
    return Numbers(*(rng.choice(ODD) for _ in range(5)))


def some_accumulators(rng: random.Random) -> dict[str, AccumulatorEvidence]:
    names = rng.sample(["exp_avg", "exp_avg_sq", "weight_decay", "average:ema", "grad", "step"], rng.randrange(4))
    return {
        name: AccumulatorEvidence(
            name,
            rng.choice(["bfloat16", "bfloat16", "float32", "uint16", ""]),
            some_numbers(rng),
            some_numbers(rng),
            some_numbers(rng),
            rng.choice(["", "", "why"]),
            rng.choice([*ODD, 0.001]),
            rng.choice([*ODD, 256.0]),
            rng.choice(["", "", "rounded"]),
        )
        for name in names
    }


def some_tensor(rng: random.Random, name: str) -> TensorEvidence:
    return TensorEvidence(
        name=name,
        dtype=rng.choice(["bfloat16", "float16", "float32", "float8_e4m3fn", "weird", ""]),
        numel=rng.choice([0, 1, 64, 4096]),
        layer=rng.choice(["", "a"]),
        optimizer_group=rng.choice(["", "0/0", "0/0", "0/0"]),
        trainable=rng.random() < 0.9,
        reason=rng.choice(["", "", "", "why"]),
        steps=rng.choice(COUNTS),
        measured_steps=rng.choice(COUNTS),
        gradless_steps=rng.choice([0, 0, *COUNTS]),
        skipped_steps=rng.choice([0, 0, 0, 3, 128]),
        zero_gradient_fraction=rng.choice(ODD),
        finite=rng.random() < 0.8,
        numbers=some_numbers(rng),
        changed_fraction=rng.choice(ODD),
        update_ratio=rng.choice(ODD),
        applied_ratio=rng.choice(ODD),
        headroom_histogram=rng.choice(
            [None, (), histogram(-5), histogram(4, 5), tuple(x or 0.0 for x in rng.choices(ODD, k=HEADROOM_BINS))]
        ),
        lr=rng.choice(ODD),
        lr_max=rng.choice(ODD),
        lr_min=rng.choice(ODD),
        weight_decay=rng.choice(ODD),
        critical_lr=rng.choice(ODD),
        state_factor=rng.choice(ODD),
        state_factor_steps=rng.choice(COUNTS),
        scheme=rng.choice(["plain", "plain", "stochastic", "carried", "carried:exp_avg", "unknown", "other"]),
        displacement_evidence=rng.choice(ODD),
        accumulators=some_accumulators(rng),
    )


def some_run(seed: int) -> list[list[TensorEvidence]]:
    """Windows of a run in which anything may be known, unknown or absurd."""
    rng = random.Random(seed)
    names = ["a.w", "b.w", "b.v"]
    return [[some_tensor(rng, name) for name in names[: rng.randrange(4)]] for _ in range(rng.randrange(1, 8))]


runs = st.builds(some_run, st.integers(0, 2**32))


def judged(windows: list[list[TensorEvidence]], split: int | None = None) -> tuple[list[Report], dict[str, Any]]:
    """All reports with alerts; with a resume from plain data before window `split`."""
    diagnosis, alerts = Diagnosis(Thresholds()), Alerts(Thresholds(), clock=lambda: 1e9)
    found = []
    for i, tensors in enumerate(windows):
        if i == split:
            resumed = Diagnosis(Thresholds())
            resumed.load_state_dict(json.loads(json.dumps(diagnosis.state_dict(), allow_nan=False)))
            later = Alerts(Thresholds(), clock=lambda: 1e9)
            later.load_state_dict(json.loads(json.dumps(alerts.state_dict(), allow_nan=False)))
            diagnosis, alerts = resumed, later
        found.append(alerts.update(diagnosis.judge(window(*tensors, step=128 * (i + 1)))))
    return found, diagnosis.state_dict()


def same(a: Any, b: Any) -> bool:
    return repr(a) == repr(b)  # NaN is NaN


@settings(max_examples=200, deadline=None)
@given(runs)
def test_whatever_is_known_or_not_judging_neither_raises_nor_varies(windows: list[list[TensorEvidence]]) -> None:
    found, state = judged(windows)
    assert same((found, state), judged(windows))
    for report in found:
        assert report.headline
        assert json.loads(json.dumps(report.to_dict(), allow_nan=False))
        for t in report.tensors:
            assert t.health in (Health.healthy, Health.frozen) or t.advice
            assert all(len(a.title) < 64 for a in report.alerts)


@settings(max_examples=100, deadline=None)
@given(runs, st.integers(0, 5))
def test_a_resume_at_any_time_changes_nothing(windows: list[list[TensorEvidence]], split: int) -> None:
    assert same(judged(windows), judged(windows, split))


@settings(max_examples=100, deadline=None)
@given(runs)
def test_idle_and_frozen_never_warn(windows: list[list[TensorEvidence]]) -> None:
    still: dict[str, Any] = {**STILL, "moved": None, "written_between": None}
    asleep = [
        [
            dataclasses.replace(t, trainable=False, **still)
            if i % 2
            else dataclasses.replace(t, finite=True, optimizer_group="", **still)
            for t in w
        ]
        + [tensor(name="awake")]
        for i, w in enumerate(windows)
    ]
    found, _ = judged(asleep)
    healths = {t.health for r in found for t in r.tensors if t.name != "awake"}
    assert healths <= {Health.idle, Health.frozen, Health.unknown}
    assert [a for r in found for a in r.alerts if a.level is not Level.info] == []


@settings(max_examples=100, deadline=None)
@given(runs)
def test_who_is_alerted_about_has_the_health_for_it(windows: list[list[TensorEvidence]]) -> None:
    for report in judged(windows)[0]:
        healths = {t.name: t for t in report.tensors}
        for alert, name in itertools.chain.from_iterable(((a, n) for n in a.tensors) for a in report.alerts):
            if alert.level is not Level.info and not alert.title.startswith(
                ("NOTHING", "NOT MEASURED", "STILL MOVING")
            ):
                t = healths[name]
                parts = [t.health, *(a.health for a in t.accumulators.values())]
                assert {Health.broken, Health.stalled, Health.stalling} & set(parts)


def test_the_numbers_of_an_accumulator_are_reported() -> None:
    found = verdict(tensor(accumulators=accumulator("exp_avg", 0.9, growth=0.7, decay=0.6, rate=0.1)))
    a = found.accumulators["exp_avg"]
    assert (a.efficiency, a.displacement_efficiency, a.growth_efficiency, a.decay_efficiency) == (0.9, 0.9, 0.7, 0.6)
    assert (a.lost_fraction, a.wanted_fraction) == (numbers(0.9).lost_fraction, 1.0)
