"""Reports in other loggers, read back with what the logger itself reads with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from tests.support.wandb.samples import sample_report
from update_watch.dashboards import LogSink, MlflowSink, TensorBoardSink, TrackioSink
from update_watch.dashboards.headroom import headroom_counts
from update_watch.dashboards.loggers.numbers import VERDICT
from update_watch.dashboards.metrics import HEADROOM, run_values
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW


def test_any_function_gets_the_runs_numbers_and_the_reports_step() -> None:
    seen: list[tuple[dict[str, float], int]] = []
    report = sample_report(256)
    LogSink(lambda values, step: seen.append((values, step)))(report)
    assert seen == [(run_values(report), 256)]


def test_tensorboard_reads_scalars_histogram_and_the_verdict_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import TENSORS, EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    reports = [sample_report(128), sample_report(256)]
    assert reports[0].headline == reports[1].headline
    reports.append(dataclasses.replace(sample_report(384), headline="Another."))
    with SummaryWriter(tmp_path) as writer:
        sink = TensorBoardSink(writer)
        for report in reports:
            sink(report)
    events = EventAccumulator(str(tmp_path), size_guidance={TENSORS: 0}).Reload()
    for key, value in run_values(reports[1]).items():
        assert [event.step for event in events.Scalars(key)] == [128, 256, 384], key
        assert events.Scalars(key)[1].value == pytest.approx(value, rel=1e-6), key
    histogram = events.Histograms(HEADROOM)[0].histogram_value
    counts = headroom_counts(reports[0].tensors)
    assert counts.sum() > 0 and histogram.num == counts.sum()
    assert histogram.bucket == counts.tolist()
    assert histogram.bucket_limit == [HEADROOM_LOW + 1 + i for i in range(HEADROOM_BINS)]
    texts = events.Tensors(f"{VERDICT}/text_summary")
    assert [event.step for event in texts] == [128, 384]
    assert texts[1].tensor_proto.string_val[0].decode() == "Another."


def test_mlflow_reads_every_metric_at_its_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    client = mlflow.MlflowClient(tracking_uri=tmp_path.as_uri())
    run_id = client.create_run(client.create_experiment("e")).info.run_id
    sink = MlflowSink(client, run_id)
    for step in (128, 256):
        sink(sample_report(step))
    for key, value in run_values(sample_report(256)).items():
        history = client.get_metric_history(run_id, key)
        assert [(m.step, m.value) for m in history][-1] == (256, pytest.approx(value)), key
        assert len(history) == 2
    assert client.get_run(run_id).data.tags[VERDICT] == sample_report(256).headline


def test_trackio_gets_numbers_and_verdict_under_the_reports_step() -> None:
    class Run:
        """`log` as trackio has it."""

        def __init__(self) -> None:
            self.rows: list[tuple[dict[str, Any], int | None]] = []

        def log(self, metrics: dict[str, Any], step: int | None = None) -> None:
            self.rows.append((metrics, step))

    run, report = Run(), sample_report(128)
    TrackioSink(run)(report)
    assert run.rows == [({**run_values(report), VERDICT: report.headline}, 128)]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LogSink({}), "must be a function"),  # type: ignore[arg-type]
        (lambda: TensorBoardSink("runs"), "has no add_scalar: give a SummaryWriter"),
        (lambda: TrackioSink(None), "has no log"),
        (lambda: MlflowSink(None, "x"), "must be a mlflow.MlflowClient"),
        (lambda: MlflowSink(type("Client", (), {"log_batch": print})(), ""), "must be the id of a run"),
    ],
    ids=["log", "tensorboard", "trackio", "mlflow", "mlflow-run"],
)
def test_wrong_arguments_are_named_with_the_remedy(make: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        make()
