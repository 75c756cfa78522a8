"""Counts in Lightning's progress bar as whole numbers: what is logged becomes a float there, and is drawn as 2.000."""

from __future__ import annotations

from typing import Any

COUNTS = frozenset({"stalled", "unknown"})


class WholeCounts:
    """Stands in `get_metrics` of a progress bar, the place Lightning has for changing what is shown, until `end`."""

    def __init__(self, bar: Any) -> None:
        """`bar`: the Trainer's `progress_bar_callback`, or None."""
        self._bar = bar
        if bar is not None:
            self._shown = bar.get_metrics
            bar.get_metrics = self._whole

    def _whole(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        shown: dict[str, Any] = self._shown(*args, **kwargs)
        counts = {name: value for name, value in shown.items() if name in COUNTS and isinstance(value, float)}
        return {**shown, **{name: f"{value:.0f}" for name, value in counts.items() if value.is_integer()}}

    def end(self) -> None:
        """The bar as it was."""
        if self._bar is not None and vars(self._bar).get("get_metrics") == self._whole:
            del self._bar.get_metrics
        self._bar = None
