"""What is to come, added to each report: what the schedule will do (`forecast`), and whether the run leaves its range (`divergence`)."""

from __future__ import annotations

from update_watch.foresight.schedules import Schedule
from update_watch.judge.forecast.divergences import Divergences
from update_watch.judge.forecast.forecaster import Forecaster
from update_watch.report import Report
from update_watch.thresholds import Thresholds


class Outlook:
    """Sees every report of a run, in order. `schedule` None: no forecast is made."""

    def __init__(self, schedule: Schedule | None, thresholds: Thresholds) -> None:
        self._forecaster, self._divergences = Forecaster(schedule, thresholds), Divergences()

    def add(self, report: Report) -> Report:
        """The report with what is to come."""
        return self._divergences.add(self._forecaster.add(report))
