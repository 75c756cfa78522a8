"""The sink with the real wandb client, online against a server on the loopback, in good and in bad times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.wandb.loopback import LoopbackServer
from update_watch.dashboards import metrics

STEP = "trainer/global_step"
SCRIPT = Path(__file__).parents[2] / "support" / "wandb" / "training.py"


@pytest.fixture
def server() -> Iterator[LoopbackServer]:
    with LoopbackServer() as loopback:
        yield loopback


class Training:
    """A training process."""

    def __init__(self, server: LoopbackServer, directory: Path, **options: Any) -> None:
        arguments = json.dumps({"url": server.url, "dir": str(directory), **options})
        # no accelerator is searched for, no proxy between the client and the loopback
        environment = {k: v for k, v in os.environ.items() if not k.upper().endswith("_PROXY")}
        environment.update(WANDB_ERROR_REPORTING="false", NO_PROXY="127.0.0.1", HOME=str(directory))
        self._process = subprocess.Popen(
            [sys.executable, str(SCRIPT), arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=directory,
        )

    def result(self, timeout: float = 60) -> dict[str, Any]:
        """What it printed; it has to end by itself within `timeout` seconds."""
        try:
            out, err = self._process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()
            raise AssertionError(f"training did not end within {timeout} s") from None
        assert self._process.returncode == 0, err
        result: dict[str, Any] = json.loads(out.splitlines()[-1])
        return result


def wait_until(condition: Callable[[], bool], timeout: float = 30) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout} s in vain"
        time.sleep(0.05)


def assert_nothing_is_lost(server: LoopbackServer, result: dict[str, Any]) -> None:
    rows = [row for row in server.history if "update_watch/efficiency" in row]
    assert [row[STEP] for row in rows] == result["steps"]
    assert all(any(key.startswith("update_watch/by_kind/") for key in row) for row in rows)
    assert server.run.summary[STEP] == result["steps"][-1]
    assert server.run.summary["update_watch/health"] == "stalled"
    assert server.run.config["update_watch"]["value"]["window"] == 32
    assert server.run.complete
    assert server.run.exit_code == 0


def assert_training_is_undisturbed(result: dict[str, Any]) -> None:
    # medians of steps of about a millisecond, watched against alone within one run, on a shared machine
    assert 0.7 < result["ratio"] < 1.4, result
    assert result["handing_cpu_ms"] < 1.0, result


def test_history_summary_config_definitions_tables_and_alerts_arrive(server: LoopbackServer, tmp_path: Path) -> None:
    result = Training(server, tmp_path, windows=3, alert_windows=[1]).result()
    assert_nothing_is_lost(server, result)
    assert server.unknown == []
    assert [row["update_watch/alert"] for row in server.history if "update_watch/alert" in row] == [0, 1, 0]
    assert server.run.summary["update_watch/audit"]["bytes"] == 4096
    keys = {m.key for m in metrics.RUN_METRICS}
    defined = server.defined_metrics()
    assert {defined[key]["step_metric"] for key in keys} == {STEP}
    (alert,) = server.alerts
    name = server.run.name
    assert alert["title"] == "alert 1"
    assert alert["severity"] == "WARN"
    assert alert["waitDuration"] == 300_000
    assert alert["text"].endswith(f"Step 128, {server.url}/loopback/p/runs/{name}")
    heatmaps = [json.loads(v) for k, v in server.uploads.items() if k.endswith("update_watch/heatmap.table.json")]
    assert max(len(h["data"]) for h in heatmaps) == 10 * 3  # layers by windows


def test_an_alert_that_is_refused_loses_nothing_else(server: LoopbackServer, tmp_path: Path) -> None:
    server.fail("NotifyScriptableRunAlert", 403, times=1)
    result = Training(server, tmp_path, windows=4, alert_windows=[1, 2]).result()
    assert_nothing_is_lost(server, result)
    assert server.remaining_faults("NotifyScriptableRunAlert") == 0
    assert [a["title"] for a in server.alerts] == ["alert 2"]
    # the refused one is still data
    alerts = {r[STEP]: r["update_watch/alert"] for r in server.history if "update_watch/alert" in r}
    assert alerts == {64: 0, 128: 1, 192: 1, 256: 0}
    assert server.run.summary["update_watch/last_alert"]["count"] == 2


@pytest.mark.slow
def test_a_server_in_trouble_loses_nothing(server: LoopbackServer, tmp_path: Path) -> None:
    server.fail("file_stream", 500, times=3)
    server.fail("NotifyScriptableRunAlert", 500, times=2)
    server.fail("ArtifactType", 500, times=2)
    result = Training(server, tmp_path, windows=10, alert_windows=[3], pause=0.2).result(timeout=120)
    assert_nothing_is_lost(server, result)
    assert_training_is_undisturbed(result)
    assert server.remaining_faults("file_stream") == server.remaining_faults("NotifyScriptableRunAlert") == 0
    assert [a["title"] for a in server.alerts] == ["alert 3"]


@pytest.mark.slow
def test_an_outage_of_twenty_seconds_loses_nothing(server: LoopbackServer, tmp_path: Path) -> None:
    training = Training(server, tmp_path, windows=30, alert_windows=[15], pause=0.4)

    def go_down() -> None:
        wait_until(lambda: bool(server.runs) and len(server.run.history) >= 2)
        server.outage(20)

    saboteur = threading.Thread(target=go_down)
    saboteur.start()
    result = training.result(timeout=180)
    saboteur.join()
    assert server.dropped > 0
    assert_nothing_is_lost(server, result)
    assert_training_is_undisturbed(result)
    assert [a["title"] for a in server.alerts] == ["alert 15"]


@pytest.mark.slow
def test_two_seconds_of_latency_lose_nothing_and_slow_nothing(server: LoopbackServer, tmp_path: Path) -> None:
    server.latency = 2.0
    result = Training(server, tmp_path, windows=10, alert_windows=[3], pause=0.2).result(timeout=180)
    assert_nothing_is_lost(server, result)
    assert_training_is_undisturbed(result)
    assert [a["title"] for a in server.alerts] == ["alert 3"]


@pytest.mark.slow
def test_a_process_ends_though_its_server_is_gone_for_good(server: LoopbackServer, tmp_path: Path) -> None:
    training = Training(server, tmp_path, windows=6, pause=0.2, finish_timeout=5)
    wait_until(lambda: bool(server.runs) and len(server.run.history) >= 1)
    server.outage(600)
    training.result(timeout=120)
    # what did not arrive is on the disk, where `wandb sync` finds it
    (log,) = tmp_path.glob("wandb/run-*/*.wandb")
    assert log.stat().st_size > 0
