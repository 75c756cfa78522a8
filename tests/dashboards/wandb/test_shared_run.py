"""A run that is not ours alone: its user's configuration, and other watches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.support.wandb.loopback import API_KEY, ENTITY, LoopbackServer
from tests.support.wandb.samples import OfflineRun, sample_report
from update_watch.dashboards.wandb.sink import WandbSink
from update_watch.worker import Sinks


def shared(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if "another watch logs to this W&B run" in r.getMessage()]


@pytest.mark.parametrize("users", ["mine", {"window": 9, "enabled": True}])
def test_a_section_of_that_name_in_the_users_configuration_stays_as_it_is(start_run: Any, users: Any) -> None:
    run = start_run(reinit="create_new", config={"update_watch": users, "lr": 0.1})
    for window in (64, 128):  # a second fit in the same run
        sink = WandbSink(run)
        sink.describe({"window": window})
        sink.describe({"samples": 256})
        sink(sample_report())
    run.finish()
    config = OfflineRun(run).config
    assert config["update_watch"] == users and config["lr"] == 0.1
    assert config["update_watch_facts"] == {"window": 128, "samples": 256}


@pytest.mark.slow
@pytest.mark.parametrize("users", [None, {"window": 9}])
def test_a_run_that_is_resumed_has_its_facts_where_they_were(tmp_path: Path, users: Any) -> None:
    with LoopbackServer() as server:
        settings = wandb.Settings(
            base_url=server.url, api_key=API_KEY, console="off", silent=True, x_disable_stats=True, init_timeout=20
        )
        config = {} if users is None else {"update_watch": users}
        for resume, window, step in (("allow", 64, 128), ("must", 32, 200)):
            run = wandb.init(
                project="p", entity=ENTITY, dir=tmp_path, settings=settings, id="r", resume=resume, config=config
            )
            sink = WandbSink(run)
            sink.describe({"window": window})
            sink(sample_report(step))
            run.finish()
            assert run.resumed == (resume == "must")
        found = {key: value["value"] for key, value in server.run.config.items() if key.startswith("update_watch")}
        assert found == (
            {"update_watch": {"window": 32}} if users is None else {**config, "update_watch_facts": {"window": 32}}
        )
        assert [row["trainer/global_step"] for row in server.history if "update_watch/efficiency" in row] == [128, 200]


def test_two_watches_in_one_run_are_told_once_that_their_rows_are_mixed(
    start_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(reinit="create_new")
    first, second = WandbSink(run), WandbSink(run)
    for step in (128, 256):
        first(sample_report(step))
        second(sample_report(step))
    assert len(shared(caplog)) == 1 and "a run of its own" in shared(caplog)[0]


def test_watches_one_after_the_other_and_runs_beside_each_other_are_told_nothing(
    start_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run, other = start_run(reinit="create_new"), start_run(reinit="create_new")
    beside = WandbSink(other)
    for step in (128, 256):
        sinks = Sinks([WandbSink(run)])
        sinks(sample_report(step))
        beside(sample_report(step))
        sinks(None)  # its watch is closed
    dropped = WandbSink(run)
    dropped(sample_report(384))
    del dropped  # never closed, and gone
    WandbSink(run)(sample_report(512))
    assert shared(caplog) == []
