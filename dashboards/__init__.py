"""Sinks and renderers: they know reports and nothing else. Each is imported when it is first used."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from update_watch.dashboards.journal.journal import Journal
    from update_watch.dashboards.journal.reader import read_journal
    from update_watch.dashboards.loggers.messages import AppriseAlerts, WebhookAlerts
    from update_watch.dashboards.loggers.numbers import LogSink, MlflowSink, TensorBoardSink, TrackioSink
    from update_watch.dashboards.wandb.sink import WandbSink

__all__ = [
    "AppriseAlerts",
    "Journal",
    "LogSink",
    "MlflowSink",
    "TensorBoardSink",
    "TrackioSink",
    "WandbSink",
    "WebhookAlerts",
    "read_journal",
]

_HOMES = {
    "AppriseAlerts": "update_watch.dashboards.loggers.messages",
    "Journal": "update_watch.dashboards.journal.journal",
    "LogSink": "update_watch.dashboards.loggers.numbers",
    "MlflowSink": "update_watch.dashboards.loggers.numbers",
    "TensorBoardSink": "update_watch.dashboards.loggers.numbers",
    "TrackioSink": "update_watch.dashboards.loggers.numbers",
    "WandbSink": "update_watch.dashboards.wandb.sink",
    "WebhookAlerts": "update_watch.dashboards.loggers.messages",
    "read_journal": "update_watch.dashboards.journal.reader",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
