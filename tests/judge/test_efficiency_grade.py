"""Verdicts on arithmetic done by hand: what is noise, what is carried elsewhere, and what is lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.support.rounding_samples import Array, Gradient, drift, noise, run
from update_watch.judge.diagnosis import Diagnosis
from update_watch.report import Cause, Health, TensorReport
from update_watch.thresholds import Thresholds

BAD = {Health.stalled, Health.stalling, Health.broken}


def judged(w: Array, lr: float, **options: Any) -> list[TensorReport]:
    diagnosis = Diagnosis(Thresholds())
    return [diagnosis.judge(window).tensors[0] for window in run(w, lr, **options)]


def ones(count: int) -> Array:
    return np.ones(count)


def normal(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(0, 0.02, count)


@pytest.mark.parametrize("scheme", ["stochastic", "unknown"])
@pytest.mark.parametrize("lr", [1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("count", [1, 8, 64])
@pytest.mark.parametrize("gradient", [noise, drift])
def test_stochastic_rounding_of_ones_is_never_a_stall(scheme: str, lr: float, count: int, gradient: Gradient) -> None:
    options = {"store": "stochastic", "scheme": scheme, "gradient": gradient, "seed": count}
    found = judged(ones(count), lr, steps=16, windows=20, **options)
    found += judged(ones(count), lr, steps=128, windows=2, **options)
    assert not {t.health for t in found} & BAD


@pytest.mark.parametrize(("count", "lr"), [(64, 1e-3), (256, 1e-4), (256, 1e-3)])
def test_stochastic_rounding_is_known_to_be_healthy_once_there_is_enough_of_it(count: int, lr: float) -> None:
    found = judged(ones(count), lr, store="stochastic", scheme="stochastic")
    assert [t.health for t in found[5:]] == [Health.healthy] * 3  # healthy takes evidence


@pytest.mark.parametrize("scheme", ["carried", "unknown"])
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("steps", [16, 128])
def test_fp32_weights_kept_elsewhere_are_never_a_stall(scheme: str, lr: float, steps: int) -> None:
    for w, gradient in ((ones(64), drift), (normal(64), noise)):
        found = judged(
            w, lr, store="master", scheme=scheme, steps=steps, gradient=gradient, windows=640 // (steps + 64)
        )
        assert not {t.health for t in found} & BAD


@pytest.mark.parametrize("lr", [1e-6, 1e-4, 1e-2])
def test_fp32_weights_are_healthy(lr: float) -> None:
    for w in (ones(64), normal(64)):
        found = judged(w, lr, store="float32", scheme="plain", steps=32, windows=2)
        assert {t.health for t in found} == {Health.healthy}


@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-4, 1e-3])
@pytest.mark.parametrize("steps", [16, 128])
def test_norms_at_one_in_bf16_are_named_at_once(lr: float, steps: int) -> None:
    found = judged(ones(64), lr, scheme="plain", steps=steps, windows=2)
    assert {(t.health, t.cause) for t in found} == {(Health.stalled, Cause.weight_rounding)}


def test_norms_at_one_in_bf16_are_named_even_where_something_might_carry_the_rest() -> None:
    found = judged(ones(64), 1e-3, scheme="unknown", gradient=drift, windows=2)
    assert [t.health for t in found] == [Health.stalled, Health.stalled]


@pytest.mark.parametrize(("lr", "health"), [(1e-3, Health.healthy), (3e-5, Health.stalling), (3e-6, Health.stalled)])
def test_weights_in_bf16_stall_by_degrees(lr: float, health: Health) -> None:
    found = judged(normal(256), lr, scheme="plain", windows=2)
    assert found[1].health is health


# --- optimizer states --------------------------------------------------------------------------------


def constant(step: int, rng: np.random.Generator, w: Array) -> Array:
    return np.linspace(0.5, 2, w.size)


def falling(step: int, rng: np.random.Generator, w: Array) -> Array:
    return constant(step, rng, w) * float(np.exp(-step / 500))


def jittering(step: int, rng: np.random.Generator, w: Array) -> Array:
    return constant(step, rng, w) * (1 + 0.01 * rng.standard_normal(w.shape))


def dropping(step: int, rng: np.random.Generator, w: Array) -> Array:
    return noise(step, rng, w) * (1 if step < 200 else 0.01)


def sparse(step: int, rng: np.random.Generator, w: Array) -> Array:
    return noise(step, rng, w) * (rng.random(w.shape) < 0.05)


GRADIENTS = [noise, constant, falling, jittering, dropping, sparse]


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("beta2", [0.95, 0.995])
@pytest.mark.parametrize(("is_fused", "knows_rate"), [(True, True), (False, False)])
def test_bf16_moments_up_to_beta2_0995_are_not_accused(
    gradient: Gradient, beta2: float, is_fused: bool, knows_rate: bool
) -> None:
    found = judged(
        np.linspace(0.1, 1, 16),
        1e-3,
        store="float32",
        scheme="plain",
        states="bfloat16",
        beta2=beta2,
        is_fused=is_fused,
        knows_rate=knows_rate,
        gradient=gradient,
        windows=4,
    )
    for t in found:
        assert not {t.health, *(a.health for a in t.accumulators.values())} & BAD


@pytest.mark.parametrize(("beta2", "is_fused"), [(0.999, True), (0.999, False), (0.9999, False)])
@pytest.mark.parametrize(("knows_rate", "windows"), [(True, 1), (False, 2)])
def test_a_bf16_second_moment_that_can_only_grow_is_named_within_two_windows(
    beta2: float, is_fused: bool, knows_rate: bool, windows: int
) -> None:
    found = judged(
        np.linspace(0.1, 1, 64),
        1e-3,
        store="float32",
        scheme="plain",
        states="bfloat16",
        beta2=beta2,
        is_fused=is_fused,
        knows_rate=knows_rate,
        windows=4,
    )
    for t in found[windows - 1 :]:
        v = t.accumulators["exp_avg_sq"]
        assert (v.health, v.cause) == (Health.stalled, Cause.state_rounding)
        assert t.accumulators["exp_avg"].health is Health.healthy
        assert t.health is Health.healthy


def test_a_second_moment_left_behind_by_its_gradient_makes_the_tensor_stalling() -> None:
    found = judged(
        np.linspace(0.1, 1, 64),
        1e-3,
        store="float32",
        scheme="plain",
        states="bfloat16",
        beta2=0.998,
        gradient=dropping,
        windows=10,
    )
    assert (found[-1].health, found[-1].cause) == (Health.stalling, Cause.state_rounding)
    assert found[-1].state_factor is not None and found[-1].state_factor < 0.67
