"""The sink with the real wandb client, offline: what is in the run's transaction log afterwards."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import wandb

from tests.support.wandb.samples import (
    OfflineRun,
    healthy_tensor,
    read_records,
    sample_alert,
    sample_report,
    stalled_tensor,
)
from update_watch.dashboards import metrics
from update_watch.dashboards.wandb.alerts import run_link
from update_watch.dashboards.wandb.sink import WandbSink
from update_watch.report import Health, Level, TensorReport

STEP = "trainer/global_step"


def logged(run: Any, *reports: Any, **options: Any) -> OfflineRun:
    sink = WandbSink(run, **options)
    for report in reports:
        sink(report)
    run.finish()
    return OfflineRun(run)


def own_rows(offline: OfflineRun) -> list[dict[str, Any]]:
    return [row for row in offline.history if "update_watch/efficiency" in row]


def test_each_window_is_one_row_with_the_trainers_step_and_its_values(start_run: Any) -> None:
    first, second = sample_report(128), sample_report(256, (healthy_tensor(), stalled_tensor(efficiency=0.04)))
    offline = logged(start_run(), first, second)
    assert [row[STEP] for row in offline.history] == [128, 256]
    row = offline.history[1]
    assert {k: row[k] for k in metrics.run_values(second)} == pytest.approx(metrics.run_values(second))
    series = {k: v for k, v in row.items() if k.count("/") == 2}
    assert series == {
        "update_watch/by_kind/attn": 1.0,
        "update_watch/by_kind/norm": 0.04,
        "update_watch/tensors/blocks_0_norm_weight": 0.04,
    }


def test_a_window_of_which_nothing_was_looked_at_is_no_point_of_a_chart(
    start_run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = sample_report(128, observed_steps=32, observed_at=128)
    blank = [dataclasses.replace(t, efficiency=None, lost_fraction=None, headroom_histogram=None) for t in seen.tensors]
    said = "Not looked at since the report of step 128 (900 steps ago): it stands."
    unseen = sample_report(1028, tuple(blank), window=900, observed_steps=0, observed_at=128, headline=said)
    unseen = dataclasses.replace(unseen, time=seen.time + 10_000.0)  # pictures are due
    run = start_run()
    sink = WandbSink(run)
    sink(seen)
    assert sink._session is not None
    pictures: list[Any] = []
    monkeypatch.setattr(sink._session._pictures, "log", lambda *given: pictures.append(given))
    sink(unseen)
    assert pictures == [] and sink._session._grid.spans == [(0, 128)]
    run.finish()
    offline = OfflineRun(run)
    first, row = (r for r in offline.history if "update_watch/cost_ms" in r)
    assert first["update_watch/tensors_stalled"] == 1.0 and first["update_watch/unseen_steps"] == 0.0
    own = {k: v for k, v in row.items() if k.startswith("update_watch/")}
    assert set(own) == {f"update_watch/{name}" for name in ("skipped_steps", "cost_ms", "unseen_steps", "alert")}
    assert own["update_watch/unseen_steps"] == 900 and row[STEP] == 1028
    assert offline.summary["update_watch/headline"] == said


def test_the_headroom_histogram_counts_wanted_elements_per_octave(start_run: Any) -> None:
    histogram = logged(start_run(), sample_report()).history[0]["update_watch/headroom"]
    assert histogram["_type"] == "histogram"
    assert histogram["bins"] == list(range(-16, 17))
    # 300 elements three octaves above the edge, 50 of 100 wanted ones four below it
    assert {b: n for b, n in zip(histogram["bins"], histogram["values"], strict=False) if n} == {3: 300, -4: 50}


def test_tables_hold_the_heatmap_the_headroom_by_kind_and_the_unwell_tensors(start_run: Any) -> None:
    gradients = {"gradient_rms": 3e-4, "gradient_max": 2e-3, "gradient_spread": 0.25, "gradient_zeros": 0.125}
    second = sample_report(256, (healthy_tensor(), stalled_tensor(**gradients)))
    offline = logged(start_run(), sample_report(128), second)
    row = offline.pictures[1]
    assert row[STEP] == 256
    assert offline.read_table(row["update_watch/heatmap"])["data"] == [
        ["attn", 0, 128, 1.0],
        ["attn", 128, 256, 1.0],
        ["norm", 0, 128, 0.0],
        ["norm", 128, 256, 0.0],
    ]
    headroom = offline.read_table(row["update_watch/headroom_by_kind"])
    assert headroom["data"] == [["attn", 3, 1.0], ["norm", -4, 1.0]]
    tensors = offline.read_table(row["update_watch/unwell"])
    (found,) = (dict(zip(tensors["columns"], values, strict=False)) for values in tensors["data"])
    assert found == {
        "tensor": "blocks.0.norm.weight",
        "health": "stalled",
        "cause": "weight_rounding",
        "since_step": 128,
        "efficiency": 0.0,
        "net_progress": 0.02,
        "lost_fraction": 0.5,
        "update_ratio": 0.001,
        **gradients,
        "lr": 0.001,
        "critical_lr": 0.004,
        "advice": "99% of the updates are under half a gap: keep this tensor in FP32.",
    }


def test_the_table_of_unwell_tensors_is_emptied_once_all_are_well(start_run: Any) -> None:
    well = [sample_report(i, (healthy_tensor(),), health=Health.healthy) for i in (256, 384)]
    offline = logged(start_run(), sample_report(128), *well)
    rows_of = {r[STEP]: len(offline.read_table(t)["data"]) for r in offline.pictures if (t := r.get(metrics.TENSORS))}
    assert rows_of == {128: 1, 256: 0}


def test_every_run_level_key_is_defined_by_its_full_name(start_run: Any) -> None:
    offline = logged(start_run(), sample_report())
    step_of = {name: metric.step_metric for name, metric in offline.metrics.items()}
    kinds = ("histogram", "table", "page")
    keys = {m.key for m in metrics.RUN_METRICS} | {e.key for e in metrics.ENTRIES if e.kind in kinds}
    series = {key for row in offline.history for key in row if key.count("/") == 2}
    assert len(series) == 3
    assert step_of == {STEP: ""} | dict.fromkeys(keys | series, STEP)
    hidden = {name for name, metric in offline.metrics.items() if metric.options.hidden}
    assert hidden == {m.key for m in metrics.RUN_METRICS if not m.is_shown} | series
    silent = {name for name, metric in offline.metrics.items() if metric.summary.none}
    assert silent == {m.key for m in metrics.RUN_METRICS if not m.is_summed_up} | series


def stalled_llama() -> tuple[TensorReport, ...]:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj")
    parts += ("mlp.up_proj", "mlp.down_proj", "input_layernorm", "post_attention_layernorm")
    names = [f"model.layers.{i}.{part}.weight" for i in range(32) for part in parts]
    return tuple(
        stalled_tensor(n) for n in ("model.embed_tokens.weight", *names, "model.norm.weight", "lm_head.weight")
    )


def test_a_model_of_291_stalled_tensors_has_at_most_60_keys_and_the_trainings_own_stay_in_sight(start_run: Any) -> None:
    run = start_run()
    sink = WandbSink(run)
    sink.describe({"audit": {"bytes": 4096, "verdict": "norms will stall", "weights": 3, "states": 4}})
    tensors = stalled_llama()
    assert len(tensors) == 291
    for step in (128, 256):
        sink(sample_report(step, tensors, alerts=(sample_alert(step),)))
    run.log({"train/loss": 1.0, "train/lr": 1e-4, "epoch": 1, "val/loss": 2.0})
    run.finish()
    offline = OfflineRun(run)
    keys = {key for row in offline.rows for key in row if key.startswith("update_watch/")}
    keys |= {key for key in offline.summary if key.startswith("update_watch/")}
    assert len(keys) <= 60, sorted(keys)
    # W&B prints the first ten lines of the summary when a run ends: texts and numbers, in the order of the alphabet
    lines = sorted(k for k, v in offline.summary.items() if isinstance(v, (str, int, float)) and not k.startswith("_"))
    assert "val/loss" in lines[:10], lines


def test_the_verdict_is_a_page_that_is_logged_when_it_changes(start_run: Any) -> None:
    headlines = ("1 of 2 tensors is stalled since step 1.", "1 of 2 tensors is stalled since step 2.", "All is well.")
    reports = [sample_report(128 * (i + 1), headline=text) for i, text in enumerate(headlines)]
    offline = logged(start_run(), *reports)
    pages = [row for row in offline.rows if metrics.VERDICT in row]
    assert [row[STEP] for row in pages] == [128, 384]
    text = (Path(offline.path).parent / "files" / pages[0][metrics.VERDICT]["path"]).read_text()
    assert "blocks.0.norm.weight" in text
    assert "<script" not in text


def test_the_summary_says_what_is_wrong_and_the_config_how_it_was_watched(start_run: Any) -> None:
    run = start_run()
    sink = WandbSink(run)
    sink.describe({"window": 128, "thresholds": {"stalled": 0.1}})
    sink.describe({"audit": {"bytes": 4096, "verdict": "norms will stall", "w.dots": 1, "rows": list(range(300))}})
    sink(sample_report())
    run.finish()
    offline = OfflineRun(run)
    assert offline.summary["update_watch/health"] == "stalled"
    assert offline.summary["update_watch/headline"] == "1 of 2 tensors is stalled."
    assert offline.summary["update_watch/worst"]["since_step"] == 128
    assert offline.summary["update_watch/efficiency"] == 0.75
    assert offline.summary["update_watch/audit"]["bytes"] == 4096
    assert offline.summary["update_watch/audit"]["verdict"] == "norms will stall"
    config = offline.config["update_watch"]
    assert config["window"] == 128
    assert config["thresholds"] == {"stalled": 0.1}
    assert config["audit"]["w_dots"] == 1
    assert config["audit"]["rows"] == [*range(100), "and 200 more"]


def test_facts_told_before_there_is_a_run_arrive_with_the_first_report(start_run: Any) -> None:
    assert wandb.run is None
    sink = WandbSink()
    sink.describe({"window": 64})
    run = start_run()
    sink(sample_report())
    run.finish()
    assert OfflineRun(run).config["update_watch"] == {"window": 64}


def test_an_alert_is_sent_with_a_link_and_is_data_and_no_second_log_line(
    start_run: Any, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run(name="bf16-norms")
    error = dataclasses.replace(sample_alert(level=Level.error), title="x" * 80)
    offline = logged(run, sample_report(alerts=(sample_alert(), error)), sample_report(256))
    first, second = offline.alerts
    assert (first.title, first.level, first.wait_duration) == ("1 tensor stalled", "WARN", 300_000)
    assert first.text == "blocks.0.norm.weight is stalled: keep it in FP32.\nStep 128, run bf16-norms"
    assert (second.title, second.level) == ("x" * 63, "ERROR")
    assert [row["update_watch/alert"] for row in offline.history] == [1.0, 0.0]
    assert offline.summary["update_watch/last_alert"]["count"] == 2
    assert offline.summary["update_watch/last_alert"]["step"] == 128
    # the watch itself has written it to Python's log: twice would be once too often
    assert [r for r in caplog.records if "tensor stalled" in r.getMessage()] == []


def test_the_address_of_an_offline_run_is_not_asked_for() -> None:
    class Offline:
        offline, disabled, name = True, False, "bf16-norms"

        @property
        def url(self) -> str:
            raise AssertionError("prints a warning to the user's terminal")

    assert run_link(Offline()) == "run bf16-norms"  # type: ignore[arg-type]


def test_without_alerts_nothing_is_sent_and_the_data_stays(start_run: Any) -> None:
    offline = logged(start_run(), sample_report(alerts=(sample_alert(),)), alerts=False)
    assert offline.alerts == []
    assert offline.history[0]["update_watch/alert"] == 1.0


def test_names_that_differ_only_in_dots_have_series_of_their_own(start_run: Any) -> None:
    tensors = (healthy_tensor("a.b", efficiency=0.9), healthy_tensor("a_b", efficiency=0.8))
    row = logged(start_run(), sample_report(128, tensors), tensors=("a*",)).history[0]
    series = {k: v for k, v in row.items() if k.startswith("update_watch/tensors/")}
    assert sorted(series.values()) == [0.8, 0.9]
    assert series["update_watch/tensors/a_b"] == 0.9


def test_rows_of_the_training_loop_stay_as_they_are(start_run: Any) -> None:
    run = start_run()
    sink = WandbSink(run)
    for step in (128, 256):
        run.log({"loss": 1.0 / step, STEP: step - 1})
        sink(sample_report(step))
        run.log({"accuracy": step / 1000, STEP: step})
    run.finish()
    offline = OfflineRun(run)
    kept = ("loss", "accuracy", "update_watch/efficiency", STEP)
    rows = [{k: row[k] for k in kept if k in row} for row in offline.history]
    assert rows == [
        {"loss": 1 / 128, STEP: 127},
        {"update_watch/efficiency": 0.75, STEP: 128},
        {"accuracy": 0.128, STEP: 128},
        {"loss": 1 / 256, STEP: 255},
        {"update_watch/efficiency": 0.75, STEP: 256},
        {"accuracy": 0.256, STEP: 256},
    ]


def test_a_loop_that_passes_its_own_step_loses_nothing_with_commit_off(start_run: Any) -> None:
    run = start_run()
    sink = WandbSink(run, commit=False)
    for step in (128, 256):
        run.log({"loss": 1.0 / step}, step=step)
        sink(sample_report(step))
        run.log({"accuracy": step / 1000}, step=step)
    run.finish()
    kept = ("loss", "accuracy", STEP, "_step")
    rows = [{k: row[k] for k in kept} for row in OfflineRun(run).rows]
    assert rows == [
        {"loss": 1 / 128, "accuracy": 0.128, STEP: 128, "_step": 128},
        {"loss": 1 / 256, "accuracy": 0.256, STEP: 256, "_step": 256},
    ]


def test_lightnings_logger_and_the_sink_share_a_run_without_mixing_steps(start_run: Any, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import WandbLogger

    logger = WandbLogger(project="p", mode="offline", save_dir=tmp_path, settings=wandb.Settings(console="off"))
    sink = WandbSink()  # finds the logger's run
    for step in range(64, 321, 64):
        logger.log_metrics({"loss": 1.0 / step}, step=step)
        if step % 128 == 0:
            sink(sample_report(step))
    run = logger.experiment
    run.finish()
    offline = OfflineRun(run)
    assert [(row[STEP], row["loss"]) for row in offline.history if "loss" in row] == [
        (step, 1 / step) for step in range(64, 321, 64)
    ]
    assert [row[STEP] for row in own_rows(offline)] == [128, 256]
    assert all("loss" not in row for row in own_rows(offline))
    exact = {m.key for m in metrics.RUN_METRICS}
    assert exact <= set(offline.metrics)


def test_after_finish_the_sink_warns_once_and_is_silent(start_run: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", logger="update_watch.dashboards.wandb.sink")
    run = start_run()
    sink = WandbSink(run)
    sink(sample_report(128))
    run.finish()
    for step in (256, 384):
        sink(sample_report(step, alerts=(sample_alert(step),)))
    sink.describe({"window": 1})
    told = [(r.levelname, r.getMessage()) for r in caplog.records if "WandbSink" in r.getMessage()]
    assert len(told) == 1  # and nothing at a lower level: the run is not tried again
    assert told[0][0] == "WARNING"
    assert "takes no more data: reports from step 256 on are not logged. Call `watch.close()` before" in told[0][1]
    assert [row[STEP] for row in OfflineRun(run).history] == [128]


def test_without_a_run_the_sink_warns_once_and_makes_none(caplog: pytest.LogCaptureFixture) -> None:
    sink = WandbSink()
    for step in (128, 256):
        sink(sample_report(step))
    sink.describe({"window": 1})
    assert wandb.run is None
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert warnings == ["WandbSink: there is no active W&B run, reports are not logged to W&B"]


def test_a_second_run_of_the_process_gets_its_own_definitions_and_rows(start_run: Any) -> None:
    sink = WandbSink()
    sink.describe({"window": 128})
    runs = []
    for step in (128, 256):
        runs.append(start_run())
        sink(sample_report(step))
        wandb.finish()
    for run, step in zip(runs, (128, 256), strict=False):
        offline = OfflineRun(run)
        assert [row[STEP] for row in offline.history] == [step]
        assert "update_watch/efficiency" in offline.metrics
        assert offline.config["update_watch"] == {"window": 128}


def test_a_row_that_cannot_be_logged_warns_once_and_its_alert_still_goes_out(
    start_run: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = start_run()
    real_log = run.log
    bad = {128, 256}

    def log(row: dict[str, Any], **options: Any) -> None:
        if row[STEP] in bad:
            raise TypeError("not serializable")
        real_log(row, **options)

    monkeypatch.setattr(run, "log", log)
    offline = logged(run, *(sample_report(i, alerts=(sample_alert(i),)) for i in (128, 256)), sample_report(384))
    assert [row[STEP] for row in offline.history] == [384]
    assert offline.history[0]["update_watch/alert"] == 1.0  # those of the lost rows
    assert [a.title for a in offline.alerts] == ["1 tensor stalled"] * 2
    warnings = [r.getMessage() for r in caplog.records if "not logged" in r.getMessage() and r.levelname == "WARNING"]
    assert warnings == ["WandbSink: a report was not logged to W&B: TypeError: not serializable"]


def test_a_report_full_of_nan_logs_a_row_without_them(start_run: Any) -> None:
    nan = float("nan")
    broken = healthy_tensor(
        health=Health.broken, efficiency=nan, displacement_efficiency=nan, update_ratio=float("inf"), applied_ratio=nan
    )
    (row,) = logged(start_run(), sample_report(128, (broken,), cost_ms=nan)).history
    assert row["update_watch/tensors_broken"] == 1
    assert not {"update_watch/efficiency", "update_watch/cost_ms", "update_watch/update_ratio"} & set(row)
    assert [v for v in row.values() if isinstance(v, float) and math.isnan(v)] == []


def test_a_disabled_run_takes_everything_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    run = wandb.init(mode="disabled")
    sink = WandbSink(run)
    sink.describe({"audit": {"bytes": 1}})
    sink(sample_report(alerts=(sample_alert(),)))
    run.finish()
    assert [r.getMessage() for r in caplog.records if "WandbSink" in r.getMessage()] == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tensors": -1}, r"max_tensors=-1\) must be a whole number of at least 0"),
        ({"max_kinds": 0}, r"max_kinds=0\) must be a whole number of at least 1"),
        ({"tensors": "*norm*"}, r"tensors='\*norm\*'\) must be a sequence of names"),
        ({"step_key": ""}, "must name the trainer's step"),
    ],
    ids=["max_tensors", "max_kinds", "tensors", "step_key"],
)
def test_wrong_arguments_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        WandbSink(**options)


def test_a_missing_package_is_named_with_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'update-watch\[wandb\]'"):
        WandbSink()


def test_importing_the_sink_does_not_import_wandb() -> None:
    code = (
        "import sys, update_watch.dashboards.wandb.sink, update_watch.dashboards.metrics;"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('wandb', 'lightning', 'wandb_workspaces')))"
    )
    root = Path(__file__).parents[3]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_the_public_command_reads_the_same_rows(start_run: Any) -> None:
    offline = logged(start_run(), sample_report())
    command = [sys.executable, "-m", "wandb", "leet", "inspect", str(offline.path.parent), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert '"update_watch/lost_fraction":0.07142857142857142' in done.stdout


def test_a_log_still_being_written_is_read_up_to_its_last_whole_record(start_run: Any, tmp_path: Path) -> None:
    path = logged(start_run(), sample_report()).path
    whole, data = list(read_records(path)), path.read_bytes()
    part = tmp_path / "part.wandb"
    counts = []
    for length in range(len(data) + 1):
        if length % 7 and length < len(data) - 600:  # every byte of the end, every seventh before it
            continue
        part.write_bytes(data[:length])
        records = list(read_records(part))
        assert records == whole[: len(records)]
        counts.append(len(records))
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == len(whole) > 3
