"""Where healthy ends: the numbers the verdicts and alerts are made with, in one value."""

from __future__ import annotations

import dataclasses
import itertools
import math


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Limits of the verdicts and alerts. The defaults are meant for everyone.

    Common uses:
        Thresholds()                        # the defaults
        Thresholds(stalling=0.5)            # report only when half of the update is lost
        Thresholds(alerts_per_hour=2)       # a quiet channel

    Raises:
        ValueError: a value is out of its range, or two of them contradict each other.
    """

    stalled: float = 0.1
    """An efficiency below this is a stall."""

    stalled_exit: float = 0.15
    """A stalled tensor has left the stall when its efficiency reaches this."""

    stalling: float = 0.8
    """An efficiency below this is a partial stall. Rounding alone puts healthy tensors at 0.96 to 1.01."""

    stalling_exit: float = 0.88
    """A stalling tensor has recovered when its efficiency reaches this."""

    state_low: float = 0.67
    """State factor (update over what FP32 state would give) below which the optimizer state is at fault."""

    state_high: float = 1.5
    """State factor above which the optimizer state is at fault."""

    state_margin: float = 0.1
    """How far inside the band, as a fraction of its edge, a state factor must come back to have recovered."""

    minimum_steps: int = 6
    """Measured steps needed before a verdict; windows are pooled until there are as many."""

    maximum_error: float = 0.1
    """Standard error of an efficiency up to which it is taken at its word; windows are pooled until it is as small."""

    narrow_error: float = 0.03
    """Standard error of an efficiency from which on its point is taken; above it windows are pooled until two standard
    errors lie on one side of every limit."""

    pool_windows: int = 16
    """Windows pooled at most."""

    displacement_evidence: float = 0.5
    """Share of elements whose summed update reaches half a gap, from which on a displacement counts as evidence."""

    drift_windows: int = 4
    """Windows with a low displacement needed before it overrules a good efficiency."""

    negligible_lr: float = 1e-3
    """A learning rate below this share of its peak is the end of a schedule: what is lost there is not a stall."""

    skipped_windows: int = 3
    """Windows in a row in which nearly all steps were skipped, before `skipped_steps` is reported."""

    alert_cooldown: float = 900.0
    """Seconds before an alert about the same tensor is raised again after it recovered."""

    alerts_per_hour: int = 12
    """Alerts sent in any hour; the last quarter is kept for errors. What is held back is counted in the next one."""

    alert_tensors: int = 5
    """Tensors listed in an alert; the others are counted."""

    def __post_init__(self) -> None:
        for name in ("stalled", "stalled_exit", "stalling", "stalling_exit", "negligible_lr", "displacement_evidence"):
            self._check(name, 0.0, 1.0)
        for name in ("state_low", "state_high", "maximum_error", "narrow_error"):
            self._check(name, 0.0, math.inf)
        self._check("state_margin", 0.0, 0.5)
        self._check("alert_cooldown", 0.0, math.inf)
        for name in ("minimum_steps", "pool_windows", "skipped_windows", "alert_tensors", "alerts_per_hour"):
            self._check_count(name, 1)
        self._check_count("drift_windows", 2)
        self._check_order("stalled", "stalled_exit", "stalling", "stalling_exit")
        if not self.state_low < 1.0 < self.state_high:
            raise ValueError(
                f"Thresholds(state_low={self.state_low!r}, state_high={self.state_high!r}): 1 is the healthy state"
                " factor and must lie between them."
            )

    def _check(self, name: str, low: float, high: float) -> None:
        value = getattr(self, name)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or math.isinf(value):
            wanted = f"at least {low:g}" if math.isinf(high) else f"from {low:g} to {high:g}"
            raise ValueError(f"Thresholds({name}={value!r}) must be a number {wanted}.")

    def _check_count(self, name: str, low: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise ValueError(f"Thresholds({name}={value!r}) must be a whole number of at least {low}.")

    def _check_order(self, *names: str) -> None:
        for lower, upper in itertools.pairwise(names):
            a, b = getattr(self, lower), getattr(self, upper)
            if a > b:
                raise ValueError(
                    f"Thresholds({lower}={a!r}, {upper}={b!r}): {lower} must not exceed {upper}; set both."
                )
