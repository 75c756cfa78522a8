"""Where a run is heading, window by window: `course` holds what is kept of it, `signs` what is told."""

from __future__ import annotations

import math

from update_watch.columns.late_fields import changed
from update_watch.foresight.divergence import Divergence
from update_watch.judge.columns.judged import judged_of
from update_watch.judge.forecast import signs
from update_watch.judge.forecast.course import Course
from update_watch.report import Report


class Divergences:
    """Adds to each report where the run is heading, from it and from the windows before."""

    def __init__(self) -> None:
        self._course = Course()

    def add(self, report: Report) -> Report:
        """The report with its `divergence`; as it is where nothing of the run is measured."""
        if not report.window:
            return report
        points = self._course.add(report, judged_of(report))
        last = points[-1]
        if not math.isfinite(last.weight) and not last.broken and not last.skipped:
            return report
        found = tuple(sign for look in signs.ALL if (sign := look(points)) is not None)
        made = Divergence(
            step=report.step,
            weight_rms=_power_of_two(last.weight),
            gradient_rms=_power_of_two(last.gradient),
            weight_growth=signs.weight_growth(points),
            gradient_growth=signs.gradient_growth(points),
            update_excess=signs.update_excess(points),
            overflow_doublings=last.headroom if math.isfinite(last.headroom) else None,
            signs=found,
        )
        headline = f"{report.headline} {made.headline}" if made.is_warning else report.headline
        return changed(report, headline=headline, divergence=made)


def _power_of_two(log2: float) -> float | None:
    return 2.0**log2 if log2 < 1000 else None
