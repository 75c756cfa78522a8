"""How far a scenario's numbers of weights are from those of all elements in FP64, window by window."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

from bench.planted.run import Run
from bench.planted.truth import Truth
from update_watch.report import Report

# the most that each may be off: of tensors read whole, of sampled ones
BARS = {"efficiency": (0.005, 0.015), "displacement": (0.03, 0.03), "update ratio": (0.03, 0.03)}


@dataclasses.dataclass(frozen=True)
class Difference:
    """Said - true, of one number of one tensor in one window; of the update ratio by the truth."""

    number: str
    tensor: str
    window: int
    is_whole: bool
    off: float
    error: float | None  # as stated

    @property
    def is_missed(self) -> bool:
        """Neither within the bar nor within two of the stated errors, and so a number that misleads."""
        within = BARS[self.number][0 if self.is_whole else 1]
        return abs(self.off) > within and not (self.error is not None and abs(self.off) <= 2 * self.error)

    @property
    def is_far(self) -> bool:
        """Beyond the bar, whatever the stated error."""
        return abs(self.off) > BARS[self.number][0 if self.is_whole else 1]


def differences(run: Run, reports: Sequence[Report], truth: Truth, samples: int) -> list[Difference]:
    """Of all weights of which both sides have the number. Where masters or remainders are out of sight, or the rule draws, single
    steps are not to be compared."""
    found: list[Difference] = []
    for i, (report, sums) in enumerate(zip(reports, truth.sums, strict=False)):
        for t in report.tensors:
            true = sums.get(t.name)
            if true is None or t.name in run.masters or run.whole is not None or t.name in run.noisy:
                continue
            place = t.name, i + 1, t.numel <= samples
            known = {
                "efficiency": (t.efficiency, true.efficiency, t.efficiency_error),
                "displacement": (t.displacement_efficiency, true.displacement, None),
            }
            if true.before > 0 and true.want > 0:
                ratio = math.sqrt(true.want / true.before)
                said, error = t.update_ratio, t.update_ratio_error
                known["update ratio"] = (
                    None if said is None else said / ratio,
                    1.0,
                    None if error is None else error / ratio,
                )
            for number, (said, exact, error) in known.items():
                if said is not None and exact is not None:
                    found.append(Difference(number, *place, said - exact, error))
    return found


def table(found: Iterable[Difference]) -> list[str]:
    """A line for each number and kind of tensor."""
    kept = list(found)
    lines = [
        f"{'said - true':34} {'readings':>8} {'median':>8} {'95%':>8} {'largest':>8} {'beyond':>7} {'and 2 SE':>8}"
    ]
    for number, bars in BARS.items():
        for is_whole, bar in zip((True, False), bars, strict=True):
            own = [d for d in kept if d.number == number and d.is_whole is is_whole]
            off = sorted(abs(d.off) for d in own)
            if off:
                name = f"{number}, {'read whole' if is_whole else 'sampled'} ({bar:g})"
                far, missed = sum(d.is_far for d in own), sum(d.is_missed for d in own)
                at = [off[min(int(share * len(off)), len(off) - 1)] for share in (0.5, 0.95, 1.0)]
                lines.append(f"{name:34} {len(off):8} {at[0]:8.4f} {at[1]:8.4f} {at[2]:8.4f} {far:7} {missed:8}")
    return lines
