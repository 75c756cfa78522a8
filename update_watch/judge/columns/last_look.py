"""What was said of the last window of which anything was seen: it stands over windows of which nothing was.

Such a window is one that is closed by hand, or at the end of a run, while a budget lets all of its steps pass. What the host
knows all the same (steps that are skipped, learning rates, what requires no gradient) is news, and then it is judged anew.
"""

from __future__ import annotations

import numpy as np

from update_watch.judge.columns.codes import Codes
from update_watch.judge.columns.judged import Judged
from update_watch.report import Health
from update_watch.wording import last_looked


class LastLook:
    """Remembers the verdict on the run and on each tensor."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step  # of that report
        self._health, self._headline = Health.unknown, ""
        self._names: list[str] = []
        self._verdicts: tuple[Codes, Codes] | None = None

    def told(self, step: int, judged: Judged, health: Health, headline: str, is_seen: bool) -> tuple[Health, str]:
        """Health and headline of the run for a window that ends at `step`.

        `health`, `headline`: what its own numbers say; `is_seen`: whether anything of it was looked at.
        """
        if is_seen:
            self.step, self._health, self._headline = step, health, headline
            self._names, self._verdicts = judged.names, (judged.health, judged.cause)
        elif self.step is not None:
            if self._stands(judged):
                health, headline = self._health, self._headline
            if step > self.step:  # an optimizer that steps around others may have made the same step last
                headline = f"{last_looked(self.step, step)}: {headline}"
        return health, headline

    def _stands(self, judged: Judged) -> bool:
        if self._verdicts is None or judged.names != self._names:
            return False
        return all(map(np.array_equal, self._verdicts, (judged.health, judged.cause)))
