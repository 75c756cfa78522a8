"""Alerts: one story per cause of a run. `findings` is what is not well, `episodes` what is news of it, `texts` how it is told.

`alerts` puts them together. May import the rest of `judge` and what that may import.
"""

from update_watch.judge.alerts.alerts import Alerts as Alerts
