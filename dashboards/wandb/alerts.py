"""Alerts by W&B: few, and with what a person needs to act.

A `run.alert` that W&B's server keeps refusing sits in the queue that also carries the metrics, and nothing behind
it is uploaded while it is retried. So alerts go out at a bounded rate, and every alert is data as well:
`update_watch/alert` and the run's summary. (Python's log has them from the watch itself.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from update_watch.dashboards.metrics import RUN_SECTION
from update_watch.dashboards.wandb.limits import Pace
from update_watch.report import Alert

if TYPE_CHECKING:
    import wandb

BURST = 5  # alerts at once ...
PER_MINUTE = 0.1  # ... and one every ten minutes after that
WAIT_SECONDS = 300  # W&B's own cooldown for alerts of the same title
TITLE_LENGTH = 63  # documented: under 64 characters
TEXT_LENGTH = 2_000


def run_link(run: wandb.Run) -> str:
    """Where to look: the address of the run, or its name where it has none (offline, disabled)."""
    # Reading `url` of an offline run prints a warning to the user's terminal.
    url = None if run.offline or run.disabled else run.url
    return url or f"run {run.name or run.id}"


class AlertSender:
    """Sends alerts to one run, at a bounded rate."""

    def __init__(self) -> None:
        self._pace = Pace(points=1, per_minute=PER_MINUTE, burst=BURST)
        self._count = 0
        self._held_back = 0

    def send(self, run: wandb.Run, alert: Alert, time: float) -> bool:
        """Record `alert` in the summary of `run`, and send it unless too many went out before `time` (seconds).

        Returns whether it was sent.
        """
        self._count += 1
        title = f"{alert.model}: {alert.title}" if alert.model else alert.title
        said = {"title": title, "text": alert.text[:TEXT_LENGTH], "step": alert.step, "count": self._count}
        run.summary.update({f"{RUN_SECTION}/last_alert": said})
        if not self._pace.take(alert.step, time, urgent=True):
            self._held_back += 1
            return False
        held = (
            f"\n{self._held_back} earlier alert(s) were held back; see {RUN_SECTION}/alert." if self._held_back else ""
        )
        of = f" of {alert.model}" if alert.model else ""
        text = f"{alert.text[:TEXT_LENGTH]}\nStep {alert.step}{of}, {run_link(run)}{held}"
        run.alert(title=title[:TITLE_LENGTH], text=text, level=alert.level.value, wait_duration=WAIT_SECONDS)
        self._held_back = 0
        return True
