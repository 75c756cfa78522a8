"""What is to come. When a run will stall at its schedule: `curves` (what arrives at another rate), `drift` (what changes beside the
rate), `forecaster`. Whether it leaves its range before its loss does: `course` (what is kept of the windows), `signs`, `divergences`.
`outlook` adds both to a report."""

from update_watch.judge.forecast.forecaster import Forecaster, forecast

__all__ = ["Forecaster", "forecast"]
