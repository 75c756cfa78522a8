"""Alerts by webhook and apprise, received by a server of the test's own."""

from __future__ import annotations

import dataclasses
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.support.wandb.samples import sample_alert, sample_report
from update_watch.dashboards import AppriseAlerts, WebhookAlerts
from update_watch.report import Level, Report


class Receiver:
    """An HTTP server on this machine that keeps what is posted to it."""

    def __init__(self) -> None:
        self.bodies: list[Any] = []
        self.status = 200
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                receiver.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(receiver.status)
                self.end_headers()

            def log_message(self, *args: Any) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    one = Receiver()
    yield one
    one.server.shutdown()
    one.server.server_close()


def report_with(*levels: Level) -> Report:
    alerts = tuple(dataclasses.replace(sample_alert(128), level=level) for level in levels)
    return dataclasses.replace(sample_report(128), alerts=alerts)


def test_a_webhook_gets_each_alert_that_is_grave_enough(receiver: Receiver) -> None:
    sink = WebhookAlerts(f"http://{receiver.address}/hook/secret", run="gpt")
    report = report_with(Level.info, Level.warn, Level.error)
    sink(report)
    sink(report_with())
    alert = report.alerts[1]
    assert [body["text"].split(":")[0] for body in receiver.bodies] == [
        "update-watch WARN (gpt, step 128)",
        "update-watch ERROR (gpt, step 128)",
    ]
    assert receiver.bodies[0] == {"text": f"update-watch WARN (gpt, step 128): {alert.title}\n{alert.text}"}


def test_the_body_can_be_another(receiver: Receiver) -> None:
    WebhookAlerts(f"http://{receiver.address}", body=lambda alert, text: {"content": alert.title})(
        report_with(Level.error)
    )
    assert receiver.bodies == [{"content": sample_alert(128).title}]


def test_an_address_that_refuses_costs_a_line_and_keeps_its_secret(
    receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    sink = WebhookAlerts(f"http://{receiver.address}/hook/secret")
    receiver.status = 500
    with caplog.at_level(logging.WARNING, logger="update_watch"):
        sink(report_with(Level.error))
    assert len(caplog.records) == 1
    assert "the webhook at 127.0.0.1 did not take an alert" in caplog.text
    assert "secret" not in caplog.text
    receiver.status = 200
    sink(report_with(Level.error))
    assert len(receiver.bodies) == 2


def test_nobody_at_the_address_does_not_end_the_sink(caplog: pytest.LogCaptureFixture) -> None:
    one = Receiver()
    one.server.server_close()
    sink = WebhookAlerts(f"http://{one.address}", timeout=2)
    with caplog.at_level(logging.WARNING, logger="update_watch"):
        sink(report_with(Level.error))
    assert "did not take an alert" in caplog.text
    one.server.shutdown()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"url": "file:///etc/passwd"}, "must begin with http"),
        ({"url": "https://"}, "name a host"),
        ({"url": "https://a.example", "level": "LOUD"}, r"level='LOUD'\) must be one of 'INFO', 'WARN', 'ERROR'"),
        ({"url": "https://a.example", "timeout": 0}, "seconds above 0"),
    ],
    ids=["scheme", "host", "level", "timeout"],
)
def test_wrong_arguments_are_named_with_the_remedy(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        WebhookAlerts(**arguments)


def test_apprise_sends_title_text_and_severity(receiver: Receiver) -> None:
    pytest.importorskip("apprise")
    sink = AppriseAlerts(f"json://{receiver.address}/", level="INFO")
    report = report_with(Level.info, Level.error)
    sink(report)
    assert [(b["title"], b["message"], b["type"]) for b in receiver.bodies] == [
        (f"update-watch {a.level} (step 128): {a.title}", a.text, kind)
        for a, kind in zip(report.alerts, ("info", "failure"), strict=True)
    ]


def test_apprise_that_cannot_send_costs_a_line(receiver: Receiver, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("apprise")
    receiver.status = 500
    sink = AppriseAlerts([f"json://{receiver.address}/"])
    with caplog.at_level(logging.WARNING, logger="update_watch"):
        sink(report_with(Level.warn))
    assert "apprise could not send an alert of step 128" in caplog.text


def test_an_address_apprise_does_not_know_is_told_by_number_and_not_by_its_secret() -> None:
    pytest.importorskip("apprise")
    with pytest.raises(ValueError, match="does not know address number 2") as raised:
        AppriseAlerts(["json://127.0.0.1:9", "nothing-of-the-kind://secret"])
    assert "secret" not in str(raised.value)
