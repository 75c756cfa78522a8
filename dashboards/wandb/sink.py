"""Reports into a W&B run: one row of numbers per window, beside whatever else logs to the run.

    watch = uw.watch(model, optimizer, sinks=[WandbSink(run)])

The sink takes a run that exists and never makes one. It runs on the watch's background thread. Rows carry the
trainer's step under its own key and never pass `step=`: W&B drops rows whose step lies behind its counter, and
every other logger of the run moves that counter. What is logged: `update_watch.dashboards.metrics`; how often:
`update_watch.dashboards.wandb.limits`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from update_watch.dashboards import metrics
from update_watch.dashboards.wandb.alerts import AlertSender, log_alert
from update_watch.dashboards.wandb.facts import write_facts
from update_watch.dashboards.wandb.grid import LayerGrid
from update_watch.dashboards.wandb.limits import alert_table_pace, picture_pace, row_pace, series_pace
from update_watch.dashboards.wandb.names import KeyNames
from update_watch.dashboards.wandb.pictures import PictureLogger, TableRows
from update_watch.dashboards.wandb.rows import (
    HEADROOM_COLUMN_NAMES,
    HEATMAP_COLUMN_NAMES,
    TENSOR_COLUMN_NAMES,
    TensorGroups,
    headroom,
    headroom_rows,
    tensor_rows,
)
from update_watch.report import Report, TensorReport

if TYPE_CHECKING:
    import wandb

INSTALL_HINT = "WandbSink needs wandb: pip install 'update-watch[wandb]'"
HEATMAP_LAYERS = 64
HEATMAP_COLUMNS = 64

_logger = logging.getLogger(__name__)


class WandbSink:
    """A sink that logs to W&B.

    Args:
        run: the run to log to; None means `wandb.run` at the time of each report.
        step_key: key of the trainer's step, the x axis of every chart: "trainer/global_step" under Lightning,
            "train/global_step" under Hugging Face's Trainer.
        max_tensors: most series per section; a model with more tensors is logged by layer.
        alerts: send `Report.alerts` by `run.alert`.
        commit: each window is a row of its own. Set False where the training loop passes `step=` to `run.log`:
            values then join the loop's current row, and W&B's own step counter is not moved.

    Raises:
        ImportError: wandb is not installed.
        ValueError: an argument is out of range.

    Nothing else raises: trouble is reported once through `logging`, and after `run.finish()` the sink is silent.
    """

    def __init__(
        self,
        run: wandb.Run | None = None,
        *,
        step_key: str = "trainer/global_step",
        max_tensors: int = 200,
        alerts: bool = True,
        commit: bool = True,
    ) -> None:
        try:
            import wandb  # noqa: F401 here, where a missing package can still be reported to the caller
        except ImportError as error:
            raise ImportError(INSTALL_HINT) from error
        if isinstance(max_tensors, bool) or not isinstance(max_tensors, int) or max_tensors < 1:
            raise ValueError(f"WandbSink(max_tensors={max_tensors!r}) must be a whole number of at least 1")
        if not step_key or not isinstance(step_key, str):
            raise ValueError(
                f"WandbSink(step_key={step_key!r}) must name the trainer's step, such as 'trainer/global_step'"
            )
        if run is not None and not callable(getattr(run, "log", None)):
            raise TypeError(
                f"WandbSink(run={run!r}) must be a W&B run, as wandb.init() gives, or None for the active one"
            )
        self._run = run
        self._step_key = step_key
        self._max_tensors = max_tensors
        self._alerts = alerts
        self._commit = commit
        self._facts: dict[str, Any] = {}
        self._session: _Session | None = None
        self._warned: set[str] = set()

    def __call__(self, report: Report) -> None:
        """Log one report."""
        for alert in report.alerts:
            log_alert(_logger, alert)
        try:
            session = self._open()
            if session is not None:
                session.log(report)
        except Exception as error:  # noqa: BLE001  # watching must not stop training
            self._give_up(error)

    def describe(self, facts: Mapping[str, Any]) -> None:
        """Put settings and audit into the run's config, and the numbers of `facts["audit"]` into its summary.

        May be called before there is a run, from any thread, several times: later facts join earlier ones.
        Long lists are cut, so that 2,000 audited tensors do not become 2,000 config columns.
        """
        self._facts = {**self._facts, **facts}
        try:
            run = self._current_run()
            if run is not None and not (self._session and self._session.is_for(run) and self._session.finished):
                write_facts(run, self._facts)
        except Exception as error:  # noqa: BLE001  # watching must not stop training
            self._give_up(error)

    def _current_run(self) -> wandb.Run | None:
        if self._run is not None:
            return self._run
        import wandb

        return wandb.run

    def _open(self) -> _Session | None:
        """The session of the current run; a new one where the run is another than before."""
        run = self._current_run()
        if run is None:
            self._warn_once("no run", "WandbSink: there is no active W&B run, reports are not logged to W&B")
            return None
        if self._session is None or not self._session.is_for(run):
            self._session = _Session(run, self._step_key, self._max_tensors, self._alerts, self._commit)
            if self._facts:
                write_facts(run, self._facts)
        return None if self._session.finished else self._session

    def _give_up(self, error: Exception) -> None:
        from wandb.errors import UsageError

        # This is what every call of a finished run raises; nothing later can succeed.
        if isinstance(error, UsageError) and self._session is not None:
            self._session.finished = True
            self._warn_once("finished", f"WandbSink: the W&B run takes no more data, reports are not logged: {error}")
        else:
            self._warn_once("error", f"WandbSink: a report was not logged to W&B: {type(error).__name__}: {error}")

    def _warn_once(self, kind: str, message: str) -> None:
        _logger.log(logging.DEBUG if kind in self._warned else logging.WARNING, message)
        self._warned.add(kind)


class _Session:
    """What belongs to one run: its definitions, its keys, its pace."""

    def __init__(self, run: wandb.Run, step_key: str, max_tensors: int, alerts: bool, commit: bool) -> None:
        self.finished = False
        self._run = run
        self._step_key = step_key
        self._commit = None if commit else False  # None: W&B's default, a row of its own
        self._pictures = PictureLogger(run, self._commit)
        self._sender = AlertSender() if alerts else None
        self._defined = False
        self._names = KeyNames()
        self._series = TensorGroups(max_tensors)
        self._layers = TensorGroups(HEATMAP_LAYERS)
        self._grid = LayerGrid(HEATMAP_COLUMNS)
        self._row_pace = row_pace()
        self._series_pace = series_pace()
        self._picture_pace = picture_pace()
        self._alert_table_pace = alert_table_pace()
        self._alert_pending = False
        self._shown: set[str] = set()  # tables whose last version had rows
        self._summary: dict[str, str | int] = {}

    def is_for(self, run: wandb.Run) -> bool:
        return self._run is run

    def log(self, report: Report) -> None:
        if not self._defined:
            self._define()
            self._defined = True
        now = report.time or time.time()
        self._alert_pending |= bool(report.alerts)
        layers = self._layers.of(report, by_layer=True)
        efficiency = metrics.SERIES[0]
        begin = max(0, report.step - report.window)
        self._grid.add(begin, report.step, {layer: efficiency.compute(tensors) for layer, tensors in layers.items()})
        try:
            if self._row_pace.take(report.step, now, urgent=self._alert_pending):
                # One dict, so that the step is always the one these values belong to.
                self._run.log(self._row(report, now), commit=self._commit)
                self._alert_pending = False
                self._summarize(report)
                tables = self._tables(report, layers, now)
                if tables:
                    self._pictures.log({self._step_key: report.step}, tables)
        finally:
            # After the row: an alert that gets stuck must not hold back the values that explain it.
            if self._sender is not None:
                for alert in report.alerts:
                    self._sender.send(self._run, alert, now)

    def _define(self) -> None:
        """Give every key its x axis.

        By full name: beside another logger's "*" it is left to chance which of two matching globs wins. For the
        series a glob will do, as both give the same x axis; they need no column in the runs table.
        """
        run = self._run
        run.define_metric(self._step_key)
        logged = [e.key for e in metrics.ENTRIES if e.kind in ("histogram", "table")]
        for key in [m.key for m in metrics.RUN_METRICS] + logged:
            run.define_metric(key, step_metric=self._step_key)
        for series in metrics.SERIES:
            run.define_metric(f"{series.section}/*", step_metric=self._step_key, summary="none")

    def _row(self, report: Report, now: float) -> dict[str, Any]:
        row: dict[str, Any] = {self._step_key: report.step, **metrics.run_values(report)}
        row[f"{metrics.RUN_SECTION}/alert"] = float(self._alert_pending)
        groups = self._series.of(report)
        if self._series_pace.take(report.step, now, len(groups) * len(metrics.SERIES)):
            row.update(self._series_values(groups))
            row.update(headroom(report))
        return row

    def _tables(self, report: Report, layers: Mapping[str, Sequence[TensorReport]], now: float) -> dict[str, TableRows]:
        tables: dict[str, TableRows] = {}
        is_due = bool(report.alerts) and self._alert_table_pace.take(report.step, now, urgent=True)
        if self._picture_pace.take(report.step, now):
            is_due = True
            tables[metrics.HEATMAP] = TableRows(HEATMAP_COLUMN_NAMES, self._grid.rows())
            tables[metrics.HEADROOM_LAYERS] = TableRows(HEADROOM_COLUMN_NAMES, headroom_rows(layers))
        if is_due:
            tables[metrics.TENSORS] = TableRows(TENSOR_COLUMN_NAMES, tensor_rows(report))
        # An empty table only where it replaces one that is no longer true.
        tables = {key: table for key, table in tables.items() if table.rows or key in self._shown}
        self._shown = (self._shown - set(tables)) | {key for key, table in tables.items() if table.rows}
        return tables

    def _series_values(self, groups: Mapping[str, Sequence[TensorReport]]) -> dict[str, float]:
        values = {
            f"{series.section}/{self._names[name]}": series.compute(tensors)
            for name, tensors in groups.items()
            for series in metrics.SERIES
        }
        return {key: float(value) for key, value in values.items() if value is not None}

    def _summarize(self, report: Report) -> None:
        summary = metrics.summary_values(report)
        changed = {key: value for key, value in summary.items() if self._summary.get(key) != value}
        if changed:
            self._run.summary.update(changed)
            self._summary = summary
