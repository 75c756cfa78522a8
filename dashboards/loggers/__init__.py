"""Other places to log to and to be told by: any `log(dict, step)`, TensorBoard, trackio, MLflow; webhooks and apprise.

Each takes what the user has made (a writer, a module, an address) and knows reports and `dashboards.metrics`, the one table
of what is logged. None imports its package before it is used.
"""

from update_watch.dashboards.loggers.messages import AppriseAlerts, WebhookAlerts
from update_watch.dashboards.loggers.numbers import LogSink, MlflowSink, TensorBoardSink, TrackioSink

__all__ = ["AppriseAlerts", "LogSink", "MlflowSink", "TensorBoardSink", "TrackioSink", "WebhookAlerts"]
