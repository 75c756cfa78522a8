"""Reports as numbers, for loggers other than W&B: the run's metrics of `dashboards.metrics`, once per window.

    watch = uw.watch(model, optimizer, sinks=[TensorBoardSink(SummaryWriter("runs/a"))])

All of them run on the watch's background thread and log under the report's own step, the trainer's global step.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from update_watch.dashboards.headroom import headroom_counts
from update_watch.dashboards.metrics import HEADROOM, RUN_SECTION, run_values
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Report

VERDICT = f"{RUN_SECTION}/verdict"


class LogSink:
    """Calls `log(values, step)` once per window: metric key -> number, and the report's step.

    For anything that has such a function, as `LogSink(lambda values, step: fabric.log_dict(values, step))`.

    Raises:
        TypeError: `log` cannot be called.
    """

    def __init__(self, log: Callable[[dict[str, float], int], Any]) -> None:
        if not callable(log):
            raise TypeError(f"LogSink(log={log!r}) must be a function of a dict and a step")
        self._log = log

    def __call__(self, report: Report) -> None:
        self._log(run_values(report), report.step)


class TensorBoardSink:
    """Scalars, the headroom of all updates as a histogram, and the verdict as text when it changes.

    Args:
        writer: a `SummaryWriter` of `torch.utils.tensorboard` or of tensorboardX. It stays the caller's to close.
    """

    def __init__(self, writer: Any) -> None:
        for name in ("add_scalar", "add_text", "add_histogram_raw"):
            if not callable(getattr(writer, name, None)):
                raise TypeError(
                    f"TensorBoardSink(writer={writer!r}) has no {name}: give a SummaryWriter, as in "
                    "TensorBoardSink(SummaryWriter('runs/a'))"
                )
        self._writer = writer
        self._verdict = ""

    def __call__(self, report: Report) -> None:
        for key, value in run_values(report).items():
            self._writer.add_scalar(key, value, report.step)
        counts = headroom_counts(report.tensors)
        if counts.any():
            edges = np.arange(HEADROOM_LOW, HEADROOM_LOW + HEADROOM_BINS + 1, dtype=np.float64)
            middles = (edges[:-1] + edges[1:]) / 2
            self._writer.add_histogram_raw(
                HEADROOM,
                min=edges[0],
                max=edges[-1],
                num=counts.sum(),
                sum=float(counts @ middles),
                sum_squares=float(counts @ middles**2),
                bucket_limits=edges[1:].tolist(),
                bucket_counts=counts.tolist(),
                global_step=report.step,
            )
        if report.headline != self._verdict:
            self._verdict = report.headline
            self._writer.add_text(VERDICT, report.headline, report.step)


class TrackioSink:
    """Logs to the trackio run of this process: `import trackio; trackio.init(...)`, then `TrackioSink(trackio)`.

    Args:
        trackio: the module, or a run of it; whatever has `log(dict, step=)`.
    """

    def __init__(self, trackio: Any) -> None:
        if not callable(getattr(trackio, "log", None)):
            raise TypeError(f"TrackioSink(trackio={trackio!r}) has no log: give the module trackio or one of its runs")
        self._log = trackio.log

    def __call__(self, report: Report) -> None:
        self._log({**run_values(report), VERDICT: report.headline}, step=report.step)


class MlflowSink:
    """Logs to an MLflow run: numbers as metrics, the last verdict as a tag.

    Args:
        client: an `mlflow.MlflowClient`.
        run_id: of the run. MLflow's "active run" is one per thread, and sinks have a thread of their own.
    """

    def __init__(self, client: Any, run_id: str) -> None:
        if not callable(getattr(client, "log_batch", None)):
            raise TypeError(f"MlflowSink(client={client!r}) must be a mlflow.MlflowClient")
        if not isinstance(run_id, str) or not run_id:
            raise TypeError(
                f"MlflowSink(run_id={run_id!r}) must be the id of a run, as in mlflow.active_run().info.run_id"
            )
        self._client, self._run_id = client, run_id
        self._lock = threading.Lock()

    def __call__(self, report: Report) -> None:
        from mlflow.entities import Metric, RunTag

        moment = int(1000 * report.time)
        metrics = [Metric(key, value, moment, report.step) for key, value in run_values(report).items()]
        with self._lock:
            self._client.log_batch(self._run_id, metrics=metrics, tags=[RunTag(VERDICT, report.headline[:5000])])
