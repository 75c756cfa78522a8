"""A slow, honest source of evidence: AdamW on a few elements in FP64, every stored value rounded by hand.

Nothing here is shared with the code that measures real runs, so verdicts on it are verdicts on the arithmetic itself.

Legend: T steps of a window, K elements.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from update_watch.evidence import AccumulatorEvidence, Numbers, TensorEvidence, WindowEvidence
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW

Array = npt.NDArray[np.float64]
Gradient = Callable[[int, np.random.Generator, Array], Array]  # of step, noise and weight
BETA1, EPS = 0.9, 1e-8


def noise(step: int, rng: np.random.Generator, w: Array) -> Array:
    """A gradient that is all noise."""
    return rng.standard_normal(w.shape)


def drift(step: int, rng: np.random.Generator, w: Array) -> Array:
    """A gradient with a direction in its noise."""
    return rng.standard_normal(w.shape) + 0.3


def nearest(x: Array, bits: int = 8) -> Array:
    """x in a format of that many significant bits, ties to even."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(np.ldexp(mantissa, bits)), exponent - bits)


def stochastic(x: Array, rng: np.random.Generator, bits: int = 8) -> Array:
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.floor(np.ldexp(mantissa, bits) + rng.random(x.shape)), exponent - bits)


def half_gap(w: Array, d: Array, bits: int = 8) -> Array:
    """Half the distance from w to its neighbour on the side of d."""
    mantissa, exponent = np.frexp(np.abs(w))
    h = np.ldexp(0.5, exponent - bits)
    return np.where((mantissa == 0.5) & (w * d < 0), h / 2, np.maximum(h, 1e-40))


def run(
    w: Array,
    lr: float,
    *,
    store: str = "nearest",  # or "stochastic", "master", "float32"
    scheme: str,  # what the evidence says of it
    beta2: float = 0.99,
    states: str = "float32",  # or "bfloat16"
    is_fused: bool = True,  # one rounding per state and step, or two
    knows_rate: bool = True,
    gradient: Gradient = noise,
    steps: int = 128,
    windows: int = 8,
    seed: int = 0,
) -> Iterator[WindowEvidence]:
    """The windows of a run of AdamW on weights that start at `w`."""
    rng = np.random.default_rng(seed)
    bits = 24 if store == "float32" else 8
    w = nearest(w, bits)
    master, m, v = w.copy(), np.zeros(w.shape), np.zeros(w.shape)
    shadow_m, shadow_v = m, v
    for k in range(windows):
        before_TK, intended_TK, applied_TK, reference_TK = (np.zeros((steps, w.size)) for _ in range(4))
        moments = {
            name: np.zeros((3, steps, w.size)) for name in ("exp_avg", "exp_avg_sq")
        }  # before, intended, applied
        for i in range(steps):
            t = k * steps + i + 1
            g = gradient(t, rng, w)

            def update(m: Array, v: Array, t: int = t) -> Array:
                return -lr * (m / (1 - BETA1**t)) / (np.sqrt(v / (1 - beta2**t)) + EPS)

            exact_m, exact_v = BETA1 * m + (1 - BETA1) * g, beta2 * v + (1 - beta2) * g * g
            shadow_m, shadow_v = BETA1 * shadow_m + (1 - BETA1) * g, beta2 * shadow_v + (1 - beta2) * g * g
            new_m, new_v = exact_m, exact_v
            if states == "bfloat16":
                new_m = nearest(exact_m if is_fused else m + nearest((1 - BETA1) * (g - m)))
                new_v = nearest(exact_v if is_fused else nearest(beta2 * v) + (1 - beta2) * g * g)
            for name, old, exact, new in (("exp_avg", m, exact_m, new_m), ("exp_avg_sq", v, exact_v, new_v)):
                moments[name][:, i] = old, exact - old, new - old
            step = update(new_m, new_v)
            master = master + step
            after = {
                "nearest": lambda w=w, step=step: nearest(w + step),
                "stochastic": lambda w=w, step=step: stochastic(w + step, rng),
                "master": lambda: nearest(master),  # noqa: B023
                "float32": lambda w=w, step=step: nearest(w + step, 24),
            }[store]()
            before_TK[i], intended_TK[i], applied_TK[i] = w, update(exact_m, exact_v), after - w
            reference_TK[i] = update(shadow_m, shadow_v)
            w, m, v = after, new_m, new_v
        total = intended_TK.sum(0)
        tensor = TensorEvidence(
            "w",
            "float32" if store == "float32" else "bfloat16",
            w.size,
            optimizer_group="0/0",
            steps=steps,
            measured_steps=steps,
            zero_gradient_fraction=0.0,
            numbers=_numbers(applied_TK, intended_TK),
            headroom_histogram=_histogram(before_TK, intended_TK, bits),
            lr=lr,
            lr_max=lr,
            lr_min=lr,
            state_factor=float((intended_TK * reference_TK).sum() / (reference_TK**2).sum()),
            state_factor_steps=steps * (k + 1),
            scheme=scheme,
            displacement_evidence=float((np.abs(total) >= half_gap(w, total, bits)).mean()),
            accumulators={
                name: _accumulator(name, states, moments[name], rate if knows_rate else None)
                for name, rate in (("exp_avg", 1 - BETA1), ("exp_avg_sq", 1 - beta2))
            },
        )
        yield WindowEvidence((k + 1) * steps, steps, (tensor,))


def _numbers(applied_TK: Array, intended_TK: Array, where_TK: npt.NDArray[np.bool_] | None = None) -> Numbers:
    where_TK = np.ones(intended_TK.shape, bool) if where_TK is None else where_TK
    a, d = applied_TK * where_TK, intended_TK * where_TK
    wanted = d != 0
    if not wanted.any():
        return Numbers(wanted_fraction=0.0)
    dot_T, want_T = (a * d).sum(1), (d * d).sum(1)
    efficiency = dot_T.sum() / want_T.sum()
    total = d.sum(0)
    return Numbers(
        float(efficiency),
        float(np.sqrt(((dot_T - efficiency * want_T) ** 2).sum()) / want_T.sum()),
        float(a.sum(0) @ total / (total @ total)) if total.any() else None,
        float(wanted.mean()),
        float((wanted & (a == 0)).sum() / wanted.sum()),
    )


def _accumulator(name: str, dtype: str, moment_3TK: Array, rate: float | None) -> AccumulatorEvidence:
    before, intended, applied = moment_3TK
    shrinks = intended * before < 0
    return AccumulatorEvidence(
        name,
        dtype,
        _numbers(applied, intended),
        _numbers(applied, intended, ~shrinks),
        _numbers(applied, intended, shrinks),
        rate=rate,
    )


def _histogram(before_TK: Array, intended_TK: Array, bits: int) -> tuple[float, ...]:
    wanted = intended_TK != 0
    d = intended_TK[wanted]
    octaves = np.floor(np.log2(np.abs(d) / half_gap(before_TK[wanted], d, bits))) - HEADROOM_LOW
    counts = np.bincount(octaves.clip(0, HEADROOM_BINS - 1).astype(int), minlength=HEADROOM_BINS)
    return tuple(float(x) for x in counts / counts.sum())
