"""The W&B automations: what is created, and what is said where it cannot be."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator

import pytest

from tests.support.wandb.loopback import ENTITY, LoopbackServer, connected
from update_watch.dashboards import metrics
from update_watch.dashboards.wandb import automations

SLACK = {"__typename": "SlackIntegration", "id": "SW50ZWdyYXRpb246MQ==", "teamName": "acme", "channelName": "training"}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    with LoopbackServer() as loopback, connected(loopback, monkeypatch):
        loopback.integrations = [SLACK]
        yield loopback


def test_a_dry_run_tells_the_conditions_without_a_network() -> None:
    told = json.loads(automations.run("team", "project", dry_run=True))
    assert [(a["name"], a["filter"]) for a in told["automations"]] == [
        (
            "update-watch, project: tensors stalled",
            {
                "name": "update_watch/tensors_stalled",
                "agg_op": "AVERAGE",
                "window_size": 2,
                "cmp_op": "$gt",
                "threshold": 0.5,
            },
        ),
        (
            "update-watch, project: tensors broken",
            {
                "name": "update_watch/tensors_broken",
                "agg_op": None,
                "window_size": 1,
                "cmp_op": "$gt",
                "threshold": 0.5,
            },
        ),
    ]


def test_every_rule_watches_a_metric_that_is_logged() -> None:
    assert {rule.key for rule in automations.RULES} <= {m.key for m in metrics.RUN_METRICS}


def test_automations_are_created_in_the_project_and_write_to_slack(server: LoopbackServer) -> None:
    text = automations.run(ENTITY, "p", dry_run=False)
    assert [a["name"] for a in server.automations] == [rule.name_in("p") for rule in automations.RULES]
    first = server.automations[0]
    assert first["scopeType"] == "PROJECT"
    assert first["triggeringEventType"] == "RUN_METRIC"
    condition = json.loads(first["eventFilter"])["run_metric_filter"]["threshold_filter"]
    assert condition == json.loads(automations.RULES[0].filter().model_dump_json())
    notification = first["triggeredActionConfig"]["notificationActionInput"]
    assert notification["integrationID"] == SLACK["id"]
    assert notification["severity"] == "ERROR"
    assert "update_watch/worst.advice" in notification["message"]
    assert text.splitlines() == [
        "acme/training on Slack hears of loopback/p:",
        "  update-watch, p: tensors stalled: update_watch/tensors_stalled > 0.5",
        "  update-watch, p: tensors broken: update_watch/tensors_broken > 0.5",
    ]


def test_a_plan_that_does_not_allow_them_is_told_with_what_works_without(server: LoopbackServer) -> None:
    server.refused["CreateAutomation"] = "automations are not enabled for this entity"
    with pytest.raises(automations.AutomationError) as caught:
        automations.run(ENTITY, "p", dry_run=False)
    message = str(caught.value)
    assert "automations are not enabled for this entity" in message
    assert "Pro or Enterprise plan" in message
    assert "WandbSink's own alerts need neither" in message


def test_without_slack_it_says_to_connect_it_first(server: LoopbackServer) -> None:
    server.integrations = []
    with pytest.raises(automations.AutomationError, match="loopback has no Slack integration. Connect one"):
        automations.run(ENTITY, "p", dry_run=False)
    assert server.automations == []


def test_a_project_that_is_not_there_is_named(server: LoopbackServer) -> None:
    server.has_project = False
    with pytest.raises(automations.AutomationError, match="did not answer for loopback/p"):
        automations.run(ENTITY, "p", dry_run=False)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb.automations", None)
    with pytest.raises(ImportError, match=r"pip install 'update-watch\[wandb\]'"):
        automations.run("team", "project", dry_run=True)
