"""When a run will stall at its schedule: `curves` (what arrives at another rate), `drift` (what changes beside the rate), `forecaster`."""

from update_watch.judge.forecast.forecaster import Forecaster, forecast

__all__ = ["Forecaster", "forecast"]
