"""Alerts to people: by a plain webhook (Slack, Teams, Discord, your own), or by apprise to whatever it knows.

An address that does not answer costs one line in the log and the message, never the sink: the next alert tries again.
Messages are sent on the watch's background thread, one after the other, each within `timeout` seconds.
"""

from __future__ import annotations

import json
import logging
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urlsplit

from update_watch.report import Alert, Level, Report

logger = logging.getLogger("update_watch")

INSTALL_HINT = "AppriseAlerts needs apprise: pip install 'update-watch[alerts]'"
RANKS = {Level.info: 0, Level.warn: 1, Level.error: 2}
_MARKS = {Level.info: "INFO", Level.warn: "WARN", Level.error: "ERROR"}


def title_of(alert: Alert, run: str) -> str:
    """The line a phone shows first."""
    place = "".join(f"{name}, " for name in (run, alert.model) if name)
    return f"update-watch {_MARKS[alert.level]} ({place}step {alert.step:,}): {alert.title}"


def _least(level: str, owner: str) -> int:
    try:
        return RANKS[Level(level)]
    except ValueError:
        raise ValueError(
            f"{owner}(level={level!r}) must be one of {', '.join(repr(str(one.value)) for one in Level)}"
        ) from None


class WebhookAlerts:
    """Posts each alert as JSON to an address.

    The body is `{"text": ...}`, which Slack and Teams' incoming webhooks take as it is; `body` makes another of the alert,
    as `lambda alert, text: {"content": text}` for Discord.

    Args:
        url: http or https. It is a secret: neither logged nor stored.
        level: the least that is told: "INFO", "WARN" or "ERROR".
        run: name of the run, put in front of each message.
        timeout: seconds for one message.

    Raises:
        ValueError: an address or level that cannot be one.
    """

    def __init__(
        self,
        url: str,
        level: str = "WARN",
        run: str = "",
        body: Callable[[Alert, str], Any] | None = None,
        timeout: float = 10.0,
    ) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).netloc:
            raise ValueError("WebhookAlerts(url=...) must begin with http:// or https:// and name a host")
        if not timeout > 0:
            raise ValueError(f"WebhookAlerts(timeout={timeout!r}) must be a number of seconds above 0")
        self._url, self._run, self._timeout = url, run, timeout
        self._least = _least(level, "WebhookAlerts")
        self._body = body or (lambda alert, text: {"text": text})

    def __call__(self, report: Report) -> None:
        for alert in report.alerts:
            if RANKS[alert.level] >= self._least:
                self._send(alert)

    def _send(self, alert: Alert) -> None:
        data = json.dumps(self._body(alert, f"{title_of(alert, self._run)}\n{alert.text}")).encode()
        request = urllib.request.Request(self._url, data, {"Content-Type": "application/json"}, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as answer:
                answer.read(1)
        except (OSError, ValueError) as error:  # no route, refused, 4xx and 5xx, time ran out
            host = urlsplit(self._url).hostname
            logger.warning("update-watch: the webhook at %s did not take an alert: %s", host, error)


class AppriseAlerts:
    """Sends each alert by apprise: Slack, Teams, mail, Telegram, a phone, 100 more.

    Args:
        urls: apprise addresses, as "slack://token/…", "mailto://user:password@example.org"; or an `apprise.Apprise`.
        level: the least that is told: "INFO", "WARN" or "ERROR".
        run: name of the run, put in front of each message.

    Raises:
        ImportError: apprise is not installed.
        ValueError: an address that apprise does not know.
    """

    def __init__(self, urls: str | Sequence[str] | Any, level: str = "WARN", run: str = "") -> None:
        try:
            import apprise
        except ImportError as error:
            raise ImportError(INSTALL_HINT) from error
        self._least, self._run = _least(level, "AppriseAlerts"), run
        self._types = {
            Level.info: apprise.NotifyType.INFO,
            Level.warn: apprise.NotifyType.WARNING,
            Level.error: apprise.NotifyType.FAILURE,
        }
        if isinstance(urls, apprise.Apprise):
            self._apprise = urls
            return
        self._apprise = apprise.Apprise()
        addresses: Iterable[str] = [urls] if isinstance(urls, str) else urls
        for number, url in enumerate(addresses):
            if not self._apprise.add(url):
                raise ValueError(f"AppriseAlerts(urls=...): apprise does not know address number {number + 1}")

    def __call__(self, report: Report) -> None:
        for alert in report.alerts:
            if RANKS[alert.level] >= self._least and not self._apprise.notify(
                title=title_of(alert, self._run), body=alert.text, notify_type=self._types[alert.level]
            ):
                logger.warning("update-watch: apprise could not send an alert of step %d", alert.step)
