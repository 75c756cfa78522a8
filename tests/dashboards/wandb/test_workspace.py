"""The W&B workspace: what is saved, that it is saved in place, and that it draws only what is logged.

Write the golden file anew after a change on purpose: `python tests/dashboards/test_workspace.py`.
"""

from __future__ import annotations

import json
import logging
import re
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.wandb.loopback import ENTITY, LoopbackServer, connected
from update_watch.dashboards import metrics
from update_watch.dashboards.wandb import workspace

GOLDEN = Path(__file__).with_name("workspace.golden.json")


def without_ids(value: Any) -> Any:
    """The random panel ids are left out."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("__id__", "id")}
    return [without_ids(v) for v in value] if isinstance(value, list) else value


def panels_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in sections_of(spec) for panel in section["panels"]]


def sections_of(spec: dict[str, Any]) -> list[dict[str, Any]]:
    sections: list[dict[str, Any]] = spec["spec"]["section"]["panelBankConfig"]["sections"]
    return sections


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a socket was connected")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackServer]:
    with LoopbackServer() as loopback, connected(loopback, monkeypatch):
        yield loopback


def test_the_spec_is_the_golden_one_and_needs_no_network(no_network: None) -> None:
    assert without_ids(workspace.workspace_spec("team", "project")) == json.loads(GOLDEN.read_text())


def test_a_dry_run_prints_that_spec_as_json(no_network: None) -> None:
    assert without_ids(json.loads(workspace.run("team", "project", dry_run=True))) == json.loads(GOLDEN.read_text())


def test_the_sections_are_the_five_questions_in_their_order() -> None:
    assert [s["name"] for s in sections_of(workspace.workspace_spec("team", "project"))] == [
        "Is anything stalled?",
        "Which kinds, since when",
        "How far may the learning rate fall",
        "Optimizer state",
        "Cost",
    ]


def test_every_panel_draws_something_that_is_logged() -> None:
    logged = {m.key for m in metrics.RUN_METRICS} | {e.key for e in metrics.ENTRIES}
    drawn: set[str] = set()
    for panel in panels_of(workspace.workspace_spec("team", "project")):
        config = panel["config"]
        if panel["viewType"] in ("Scalar Chart", "Run History Line Plot"):
            keys = set(config.get("metrics", []))
            if "metricRegex" in config:
                matching = {s.section for s in metrics.SERIES if re.match(config["metricRegex"], s.key("a_b"))}
                assert len(matching) == 1
                keys |= matching
                logged |= matching
        elif panel["viewType"] == "Media Browser":
            keys = set(config["mediaKeys"])
        elif panel["viewType"] == "Vega2":
            (query,) = config["userQuery"]["queryFields"]
            (table,) = (f for f in query["fields"] if f["name"] == "summaryTable")
            keys = {table["args"][0]["value"]}
        else:
            keys = {config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]}
        assert keys
        assert keys <= logged, panel
        drawn |= keys
    assert {m.key for m in metrics.RUN_METRICS} - drawn == {
        # told by the others: net progress stands beside efficiency in the table, healthy is the rest
        "update_watch/net_progress",
        # for automations and tables of runs
        "update_watch/forecast_error",
        "update_watch/forecast_floor",
        "update_watch/tensors_healthy",
        "update_watch/unseen_steps",
        # for charts that somebody makes: what the training's own charts show, and what only FP32 weights have
        "update_watch/gradient_rms",
        "update_watch/gradient_zeros",
        "update_watch/copy_changed",
    }


def test_the_x_axis_is_the_step_key_the_sink_was_given() -> None:
    spec = workspace.workspace_spec("team", "project", step_key="train/global_step")
    axes = {p["config"]["xAxis"] for p in panels_of(spec) if p["viewType"] == "Run History Line Plot"}
    assert axes == {"train/global_step"}
    assert spec["spec"]["section"]["settings"]["xAxis"] == "train/global_step"


def test_saving_makes_the_view_and_both_chart_presets(server: LoopbackServer) -> None:
    url = workspace.run(ENTITY, "p", dry_run=False)
    (view,) = server.views.values()
    assert view["displayName"] == "Update watch"
    assert (view["entityName"], view["projectName"]) == (ENTITY, "p")
    expected = workspace.workspace_spec(ENTITY, "p")["spec"]
    assert without_ids(json.loads(view["spec"])) == without_ids(expected)
    assert url == f"{server.url}/{ENTITY}/p?nw={view['name'].removeprefix('nw-').removesuffix('-v')}"
    presets = {panel["config"]["panelDefId"] for panel in panels_of({"spec": expected}) if panel["viewType"] == "Vega2"}
    assert set(server.charts) == presets
    assert {json.loads(c["spec"])["data"]["name"] for c in server.charts.values()} == {"wandb"}
    assert server.unknown == []


def test_saving_again_updates_that_view_and_leaves_others_alone(server: LoopbackServer) -> None:
    server.views["mine"] = {"id": "mine", "name": "nw-mine-v", "displayName": "My own view", "spec": "{}"}
    first = workspace.save_workspace(ENTITY, "p")
    second = workspace.save_workspace(ENTITY, "p", step_key="train/global_step")
    assert first == second
    assert len(server.views) == 2
    assert server.views["mine"]["spec"] == "{}"
    (view,) = (v for v in server.views.values() if v["id"] != "mine")
    assert json.loads(view["spec"])["section"]["settings"]["xAxis"] == "train/global_step"


def test_a_refused_preset_is_told_and_the_workspace_is_saved_all_the_same(
    server: LoopbackServer, caplog: pytest.LogCaptureFixture
) -> None:
    server.refused["CreateCustomChart"] = "the name is taken"
    with caplog.at_level(logging.WARNING):
        workspace.save_workspace(ENTITY, "p")
    assert len(server.views) == 1
    warnings = [r.getMessage() for r in caplog.records if r.name == workspace.__name__]
    assert len(warnings) == 2
    assert f"{ENTITY}/update-watch-heatmap-v2 was not made" in warnings[0]
    assert "the name is taken" in warnings[0]


@pytest.mark.parametrize("operation", ["UpsertView2", "UpdateWatchViews"])
def test_a_refusal_names_the_project_the_servers_words_and_what_to_check(
    server: LoopbackServer, operation: str
) -> None:
    server.refused[operation] = "permission denied"
    with pytest.raises(workspace.WorkspaceError, match=r"loopback/p: .*permission denied\. Is the entity's name right"):
        workspace.run(ENTITY, "p", dry_run=False)


def test_a_project_that_is_not_there_is_named(server: LoopbackServer) -> None:
    server.has_project = False
    with pytest.raises(workspace.WorkspaceError, match="the project was not found"):
        workspace.run(ENTITY, "p", dry_run=False)
    assert server.views == {}


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb_workspaces.workspaces", None)
    with pytest.raises(ImportError, match=r"pip install 'update-watch\[wandb\]'"):
        workspace.run("team", "project", dry_run=True)


if __name__ == "__main__":
    spec = without_ids(workspace.workspace_spec("team", "project"))
    GOLDEN.write_text(json.dumps(spec, indent=1, sort_keys=True) + "\n")
