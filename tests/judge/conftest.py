"""What tests of alerts are given."""

from __future__ import annotations

import pytest

from tests.support.alert_samples import Clock
from update_watch.judge.alerts import Alerts
from update_watch.thresholds import Thresholds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def alerts(clock: Clock) -> Alerts:
    return Alerts(Thresholds(), clock)
