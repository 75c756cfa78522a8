"""How well a tensor's updates arrive, from the efficiencies of one window or of as many as it takes to be sure.

Two numbers speak: the efficiency of single steps, with a standard error, and the displacement efficiency over a window,
which counts as evidence where enough elements were meant to move by half a gap or more. Who may accuse depends on the
rounding scheme:

- rounding to nearest ("plain"): the efficiency alone, as nothing can arrive later;
- weight and compensation joined ("carried:<state>"): the efficiency, unless the displacement shows that the rest arrived
  later;
- stochastic rounding: the same, once so many changes were expected that their number means something;
- anything else, where FP32 weights or a compensation elsewhere may hold the rest ("unknown") or something is known to
  ("carried"): only the displacement. A first window starts with an empty remainder and may read 0.4, so half a loss
  must be seen twice.

Windows are pooled until the interval of the efficiency (two standard errors) lies on one side of every limit, or is narrow;
till then an earlier verdict stands, and a first one is not given: healthy needs evidence as stalled does.

A good efficiency is overruled by a low displacement over several windows: the drift is lost under passing oscillation.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from update_watch.evidence import TensorEvidence
from update_watch.judge import reasons
from update_watch.judge.history import HEALTHY, STALLED, STALLING, UNKNOWN, PooledWindow, TensorHistory
from update_watch.report import HEADROOM_LOW, Health
from update_watch.thresholds import Thresholds

_FP32_NOISE = 0.02  # of the efficiency of FP64 weights, whose samples are compared in FP32
SURE = 2.0  # standard errors, where the spread over steps is all the noise there is
SURER = 3.0  # where few rare changes make the spread itself uncertain
EXPECTED_CHANGES = 100.0  # under stochastic rounding: half of them has a chance of 1e-8
ALWAYS = 1e9
WINDOW_NOISE = 0.1  # least standard deviation of a displacement efficiency between windows
UNDEFINED = 0.3  # least standard error of what one step alone has shown
NOTHING = 0.01  # of an update
UNLOST = 0.01  # so small a lost fraction cannot explain an efficiency below ROUNDED_LEAST
ROUNDED_LEAST = 0.6  # what survives rounding is at least 2/3 of what was intended
ROUNDED_MOST = 2.5  # and at most twice
CARRIED_MOST = 1.5  # the same where what is lost in one step comes in another
BACKWARDS = -0.1
# chance that an update in each bin of the headroom histogram is rounded away from the stored value: |update| / gap
CHANGE_CHANCE = [min(1.0, 2.0 ** (HEADROOM_LOW + i - 0.5)) for i in range(64)]


class Score(NamedTuple):
    """Healthy, stalling or stalled with the numbers behind it, or unknown with the reason."""

    health: Health
    reason: str = ""
    efficiency: float = 1.0
    lost: float = 0.0
    drift: float | None = None  # the displacement efficiency, where that is the finding


class Pooled(NamedTuple):
    """The latest windows together."""

    steps: int  # measured
    efficiency: float
    error: float
    lost: float
    expected: float  # changes under stochastic rounding
    windows: int


def known(value: float | None) -> float | None:
    """The value, or None when it is not a number one can go on with: NaN, infinity, 1e30 and beyond."""
    return value if value is not None and -1e30 < value < 1e30 else None


def share(value: float | None) -> float | None:
    """A share, 0..1, or None when it is not known."""
    value = known(value)
    return None if value is None else min(max(value, 0.0), 1.0)


def grade(value: float, previous: Health, limits: Thresholds) -> Health:
    """Healthy, stalling or stalled, with hysteresis: what was worse must come back further."""
    if value < (limits.stalled_exit if previous is STALLED else limits.stalled):
        return STALLED
    if value < (limits.stalling if previous is HEALTHY else limits.stalling_exit):
        return STALLING
    return HEALTHY


def is_exact(scheme: str) -> bool:
    """Whether single steps show all there is: nothing is random, and nothing is carried that is not counted."""
    return scheme == "plain" or scheme.startswith("carried:")


def score(e: TensorEvidence, history: TensorHistory, limits: Thresholds) -> Score:
    """Add a window's evidence to the history and say what all of it shows."""
    displacement, exact = None, is_exact(e.scheme)
    efficiency = known(e.numbers.efficiency)
    if e.measured_steps and efficiency is not None:
        _remember(e, efficiency, history, exact)
        if (known(e.displacement_evidence) or 0.0) >= limits.displacement_evidence:
            displacement = known(e.numbers.displacement_efficiency)
    else:
        history.age += not e.is_resting
        if history.age > limits.pool_windows:
            history.forget_evidence()
        if not history.pool:
            return Score(UNKNOWN, reasons.not_measured(e.steps))
    if displacement is not None:
        history.drift.append(displacement)
        del history.drift[: -2 * limits.drift_windows]
        history.proven = displacement >= limits.stalling or (history.proven and displacement >= limits.stalling / 2)
    margin = SURE if exact else SURER
    pooled = _pool(history, limits, margin if exact or e.scheme == "stochastic" else None)
    if pooled.steps < limits.minimum_steps:
        return Score(UNKNOWN, reasons.too_few_steps(pooled.steps, limits.minimum_steps))
    if e.scheme == "plain":  # what was lost cannot arrive later, whatever the displacement of a few steps says
        result = _by_steps(pooled, None, history, limits, exact, ROUNDED_MOST)
    elif exact or e.scheme == "stochastic":
        result = _by_steps(pooled, displacement, history, limits, exact, CARRIED_MOST)
    else:
        result = _by_displacement(pooled, displacement, history, limits, e.scheme == "carried")
    if result.health is HEALTHY:
        drift = _lost_drift(history, limits)
        if drift is not None:
            result = Score(grade(drift, history.grade, limits), "", pooled.efficiency, pooled.lost, drift)
    # FP64 takes all of an update that FP32 samples can show: any other figure is theirs, not the weight's
    if e.dtype == "float64" and (result.health in (STALLING, STALLED) or abs(pooled.efficiency - 1) > _FP32_NOISE):
        return Score(UNKNOWN, reasons.finer_than_fp32())
    return result


def _by_steps(
    pooled: Pooled, displacement: float | None, history: TensorHistory, limits: Thresholds, exact: bool, most: float
) -> Score:
    efficiency, error, lost = pooled.efficiency, pooled.error, pooled.lost
    margin = (SURE if exact else SURER) * error
    health = grade(efficiency, history.grade, limits)
    if not _is_decided(efficiency, error, margin, exact, history, limits):
        if pooled.windows >= limits.pool_windows:
            if error > limits.maximum_error:
                return Score(UNKNOWN, reasons.too_noisy(efficiency, error, pooled.windows))
        elif (mildest := grade(efficiency + margin, history.grade, limits)) is HEALTHY:
            if displacement is not None and displacement >= limits.stalling:
                return Score(HEALTHY, "", efficiency, lost)  # two numbers that agree
            if history.graded is None:
                return Score(UNKNOWN, reasons.too_noisy(efficiency, error, pooled.windows))
            health = history.grade  # till more is known, the earlier verdict stands
        elif efficiency > (NOTHING if efficiency + margin > limits.stalled_exit else limits.stalled / 2):
            health = mildest  # only how bad it is is not certain; where nothing arrived, it is
    if exact and efficiency - margin > most:
        return Score(UNKNOWN, reasons.unexplained(efficiency, None))
    if health is not HEALTHY and displacement is not None and displacement > efficiency:
        health = grade(displacement, history.grade, limits)
    if health is HEALTHY:
        return Score(health, "", efficiency, lost)
    if not exact and pooled.expected < EXPECTED_CHANGES:
        return Score(UNKNOWN, reasons.too_small())
    if exact and (efficiency < BACKWARDS or (efficiency < ROUNDED_LEAST and lost < UNLOST)):
        return Score(UNKNOWN, reasons.unexplained(efficiency, lost))
    return Score(health, "", efficiency, lost)


def _is_decided(
    efficiency: float, error: float, margin: float, is_exact: bool, history: TensorHistory, limits: Thresholds
) -> bool:
    """Whether the interval is on one side of every limit, or narrow (under random rounding the error itself is not known)."""
    if is_exact and error <= limits.narrow_error:
        return True
    return grade(efficiency - margin, history.grade, limits) is grade(efficiency + margin, history.grade, limits)


def _by_displacement(
    pooled: Pooled, displacement: float | None, history: TensorHistory, limits: Thresholds, is_carried: bool
) -> Score:
    efficiency, error, lost = pooled.efficiency, pooled.error, pooled.lost
    margin = SURER * error
    if efficiency - margin > CARRIED_MOST:
        return Score(UNKNOWN, reasons.unexplained(efficiency, None))
    if error <= limits.maximum_error and grade(efficiency - margin, history.grade, limits) is HEALTHY:
        return Score(HEALTHY, "", efficiency, lost)
    if displacement is None:
        if is_carried or history.proven:
            return Score(HEALTHY, "", efficiency, lost)
        return Score(UNKNOWN, reasons.remainder_unclear(efficiency))
    value = displacement
    if displacement >= limits.stalled and len(history.drift) > 1:
        value = max(displacement, history.drift[-2])
    health = grade(max(value, efficiency), history.grade, limits)
    if health is STALLING and len(history.drift) < 2:
        return Score(UNKNOWN, reasons.remainder_unclear(efficiency))
    if health is not HEALTHY and efficiency + margin >= limits.stalling:
        return Score(UNKNOWN, reasons.too_noisy(efficiency, error, pooled.windows))
    if health is not HEALTHY and pooled.expected < EXPECTED_CHANGES:
        return Score(UNKNOWN, reasons.too_small())
    return Score(health, "", efficiency, lost)


def _remember(e: TensorEvidence, efficiency: float, history: TensorHistory, exact: bool) -> None:
    history.age = 0
    stated = known(e.numbers.efficiency_error)
    error = math.inf if stated is None else abs(stated)
    history.pool.append(
        PooledWindow(
            e.measured_steps,
            efficiency,
            None if stated is None else error,
            share(e.numbers.lost_fraction) or 0.0,
            ALWAYS if exact else _expected_changes(e),
            min(abs(known(e.numbers.unseen_error) or 0.0), error),
            _movement(e),
        )
    )


def _movement(e: TensorEvidence) -> float:
    """|intended|^2 of a step by the square of its learning rate, which a schedule does not change; 0: not known."""
    size, lr = known(e.numbers.weight), known(e.lr_max if e.lr_max is not None else e.lr)
    found = size / lr**2 if size and lr else 0.0
    return found if 0 < found < ALWAYS**2 else 0.0


def _pool(history: TensorHistory, limits: Thresholds, margin: float | None) -> Pooled:
    """As few of the latest windows as give enough evidence; older ones are forgotten.

    A window weighs by its measured steps; windows of one step by what moved in it, too: where a few elements carry that, and a
    step has met none of them, what it says of all others is of little weight. `margin`: standard errors that decide; None where the
    efficiency does not. Errors of windows are independent but for what large steps that are never measured make of all of
    them: that does not average out.
    """
    pool = history.pool
    found = Pooled(0, 0.0, 0.0, 0.0, 0.0, 0)
    for used in range(1, min(len(pool), limits.pool_windows) + 1):
        found = _joined(pool[-used:])
        if (
            found.steps < limits.minimum_steps
            or found.error > limits.maximum_error
            or found.expected < EXPECTED_CHANGES
        ):
            continue
        decides = margin is None or _is_decided(
            found.efficiency, found.error, margin * found.error, margin == SURE, history, limits
        )
        if decides:
            break
    if found.windows < len(pool):
        del pool[: len(pool) - found.windows]
    return found


def _joined(windows: list[PooledWindow]) -> Pooled:
    """Some windows as one."""
    are_weighed = all([one.error is None and one.movement > 0 for one in windows])
    weights = [one.steps * (one.movement if are_weighed else 1.0) for one in windows]
    total = sum(weights)
    efficiency = sum([weight * one.efficiency for weight, one in zip(weights, windows, strict=True)]) / total
    square = in_common = 0.0
    lone: list[tuple[float, float]] = []
    for weight, one in zip(weights, windows, strict=True):
        in_common += weight * one.in_common
        if one.error is None:
            lone.append((weight, one.efficiency))
        else:
            square += weight**2 * (one.error**2 - one.in_common**2)
    square += _square_of_lone(lone, efficiency)
    return Pooled(
        sum([one.steps for one in windows]),
        efficiency,
        math.sqrt(max(square, 0.0) + in_common**2) / total,
        sum([weight * one.lost for weight, one in zip(weights, windows, strict=True)]) / total,
        sum([one.expected for one in windows]),
        len(windows),
    )


def _square_of_lone(lone: list[tuple[float, float]], mean: float) -> float:
    """The squared error that (weight, efficiency) of windows of one step each add: from how much they differ, and no less than
    if each were off by UNDEFINED."""
    if not lone:
        return 0.0
    least = (UNDEFINED * sum([weight for weight, _ in lone])) ** 2 / len(lone)
    spread = sum([(efficiency - mean) ** 2 for _, efficiency in lone]) / max(len(lone) - 1, 1)
    return max(least, spread * sum([weight**2 for weight, _ in lone]))


def _lost_drift(history: TensorHistory, limits: Thresholds) -> float | None:
    """Mean displacement efficiency of the latest windows, if it is certainly low; else None."""
    drift = history.drift
    n = len(drift)
    if n < limits.drift_windows:
        return None
    was_healthy = history.grade is HEALTHY
    limit = limits.stalling if was_healthy else limits.stalling_exit
    if was_healthy and drift[-1] >= limit:
        return None
    mean = sum(drift) / n
    spread = math.sqrt(sum((x - mean) ** 2 for x in drift) / (n - 1))
    return mean if mean + SURER * max(spread, WINDOW_NOISE) / math.sqrt(n) < limit else None


def _expected_changes(e: TensorEvidence) -> float:
    """Samples expected to change in this window under stochastic rounding.

    How many were looked at per step is not part of the evidence; 64 is the least that is ever used.
    """
    if not e.headroom_histogram:
        return 0.0
    chance = sum(part * p for part, p in zip(e.headroom_histogram, CHANGE_CHANCE, strict=False) if 0 < part <= 1)
    wanted = share(e.numbers.wanted_fraction)
    return float(e.measured_steps * min(e.numel, 64) * chance * (1.0 if wanted is None else wanted))
