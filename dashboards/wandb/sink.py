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
import weakref
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from update_watch.dashboards import metrics
from update_watch.dashboards.report.notebook import first_screen_html
from update_watch.dashboards.unseen import is_unseen
from update_watch.dashboards.wandb.alerts import AlertSender
from update_watch.dashboards.wandb.facts import write_facts
from update_watch.dashboards.wandb.grid import LayerGrid
from update_watch.dashboards.wandb.limits import alert_table_pace, picture_pace, row_pace, series_pace
from update_watch.dashboards.wandb.names import KeyNames
from update_watch.dashboards.wandb.pictures import PictureLogger, TableRows
from update_watch.dashboards.wandb.rows import (
    HEADROOM_COLUMN_NAMES,
    HEATMAP_COLUMN_NAMES,
    TENSOR_COLUMN_NAMES,
    ChosenTensors,
    KindGroups,
    headroom,
    headroom_rows,
    tensor_rows,
)
from update_watch.report import Report, TensorReport

if TYPE_CHECKING:
    import wandb

INSTALL_HINT = "WandbSink needs wandb: pip install 'update-watch[wandb]'"
HEATMAP_KINDS = 64
HEATMAP_COLUMNS = 64

_logger = logging.getLogger(__name__)
_WRITERS: weakref.WeakKeyDictionary[Any, weakref.ref[Any]] = (
    weakref.WeakKeyDictionary()
)  # run -> the sink that logs to it


class WandbSink:
    """A sink that logs to W&B.

    Args:
        run: the run to log to; None means `wandb.run` at the time of each report.
        step_key: key of the trainer's step, the x axis of every chart: "trainer/global_step" under Lightning,
            "train/global_step" under Hugging Face's Trainer.
        max_kinds: most kinds of tensors with a series of their own; the others share one.
        max_tensors: most tensors with a series of their own because they are not well, worst first.
        tensors: names (glob) of tensors that have a series in any case, as in ("*norm*",).
        alerts: send `Report.alerts` by `run.alert`.
        commit: each window is a row of its own. Set False where the training loop passes `step=` to `run.log`:
            values then join the loop's current row, and W&B's own step counter is not moved.

    Raises:
        ImportError: wandb is not installed.
        ValueError: an argument is out of range.

    Nothing else raises: trouble is reported once through `logging`, and after `run.finish()` the sink is silent.
    """

    closes_with_watch = True  # from then on another may log to the run

    def __init__(
        self,
        run: wandb.Run | None = None,
        *,
        step_key: str = "trainer/global_step",
        max_kinds: int = 14,
        max_tensors: int = 6,
        tensors: Sequence[str] = (),
        alerts: bool = True,
        commit: bool = True,
    ) -> None:
        try:
            import wandb  # noqa: F401 here, where a missing package can still be reported to the caller
        except ImportError as error:
            raise ImportError(INSTALL_HINT) from error
        for name, value, least in (("max_kinds", max_kinds, 1), ("max_tensors", max_tensors, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"WandbSink({name}={value!r}) must be a whole number of at least {least}")
        if isinstance(tensors, str) or not all(isinstance(pattern, str) for pattern in tensors):
            raise ValueError(f"WandbSink(tensors={tensors!r}) must be a sequence of names, such as ('*norm*',)")
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
        self._series = (max_kinds, max_tensors, tuple(tensors))
        self._alerts = alerts
        self._commit = commit
        self._facts: dict[str, Any] = {}
        self._session: _Session | None = None
        self._warned: set[str] = set()

    def __call__(self, report: Report) -> None:
        """Log one report."""
        try:
            session = self._open()
            if session is not None:
                session.log(report)
        except Exception as error:  # noqa: BLE001  # watching must not stop training
            self._give_up(error, report.step)

    def close(self) -> None:
        """The watch is closed: the run is free for another watch's sink."""
        run = self._current_run()
        if run is not None and _writer_of(run) is self:
            del _WRITERS[run]

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
            self._session = _Session(run, self._step_key, self._series, self._alerts, self._commit)
            if self._facts:
                write_facts(run, self._facts)
        if _writer_of(run) not in (None, self):
            self._warn_once(
                "shared",
                "WandbSink: another watch logs to this W&B run under the same keys, so their rows are mixed; watch both models as"
                " one, `update_watch.watch([*a.named_parameters(), *b.named_parameters()])`, or give each watch a run of its own",
            )
        else:
            _WRITERS[run] = weakref.ref(self)
        return None if self._session.finished else self._session

    def _give_up(self, error: Exception, step: int | None = None) -> None:
        from wandb.errors import UsageError

        # This is what every call of a finished run raises; nothing later can succeed.
        if isinstance(error, UsageError) and self._session is not None:
            self._session.finished = True
            which = "reports" if step is None else f"reports from step {step:,} on"
            self._warn_once(
                "finished",
                f"WandbSink: the W&B run is finished and takes no more data: {which} are not logged. Call `watch.close()` before"
                " `run.finish()`",
            )
        else:
            self._warn_once("error", f"WandbSink: a report was not logged to W&B: {type(error).__name__}: {error}")

    def _warn_once(self, kind: str, message: str) -> None:
        _logger.log(logging.DEBUG if kind in self._warned else logging.WARNING, message)
        self._warned.add(kind)


class _Session:
    """What belongs to one run: its definitions, its keys, its pace."""

    def __init__(
        self, run: wandb.Run, step_key: str, series: tuple[int, int, tuple[str, ...]], alerts: bool, commit: bool
    ) -> None:
        self.finished = False
        self._run = run
        self._step_key = step_key
        self._commit = None if commit else False  # None: W&B's default, a row of its own
        self._pictures = PictureLogger(run, self._commit)
        self._sender = AlertSender() if alerts else None
        self._defined = False
        self._names = {series.section: KeyNames() for series in metrics.SERIES}
        max_kinds, max_tensors, patterns = series
        self._kinds = KindGroups(max_kinds)
        self._chosen = ChosenTensors(patterns, max_tensors)
        self._rows = KindGroups(HEATMAP_KINDS)
        self._series_defined: set[str] = set()
        self._verdict = ""  # as it was logged last
        self._grid = LayerGrid(HEATMAP_COLUMNS)
        self._row_pace = row_pace()
        self._series_pace = series_pace()
        self._picture_pace = picture_pace()
        self._alert_table_pace = alert_table_pace()
        self._verdict_pace = alert_table_pace()
        self._alert_pending = False
        self._shown: set[str] = set()  # tables whose last version had rows
        self._summary: dict[str, Any] = {}

    def is_for(self, run: wandb.Run) -> bool:
        return self._run is run

    def log(self, report: Report) -> None:
        if not self._defined:
            self._define()
            self._defined = True
        now = report.time or time.time()
        self._alert_pending |= bool(report.alerts)
        kinds, is_seen = self._rows.of(report), not is_unseen(report)
        if is_seen:
            begin = max(0, report.step - report.window)
            self._grid.add(begin, report.step, {k: metrics.BY_KIND.compute(tensors) for k, tensors in kinds.items()})
        try:
            if self._row_pace.take(report.step, now, urgent=self._alert_pending):
                # One dict, so that the step is always the one these values belong to.
                self._run.log(self._row(report, now), commit=self._commit)
                self._alert_pending = False
                self._summarize(report)
                tables = self._tables(report, kinds, now) if is_seen else {}  # the last ones stand
                if tables:
                    self._pictures.log({self._step_key: report.step}, tables)
        finally:
            # After the row: an alert that gets stuck must not hold back the values that explain it.
            if self._sender is not None:
                for alert in report.alerts:
                    self._sender.send(self._run, alert, now)

    def _define(self) -> None:
        """Give every key its x axis, and say which W&B draws of itself.

        By full name: beside another logger's "*" it is left to chance which of two matching globs wins.
        """
        run = self._run
        run.define_metric(self._step_key)
        for metric in metrics.RUN_METRICS:
            self._define_one(metric.key, metric.is_shown, metric.is_summed_up)
        for entry in metrics.ENTRIES:
            if entry.kind in ("histogram", "table", "page"):
                run.define_metric(entry.key, step_metric=self._step_key)

    def _define_one(self, key: str, is_shown: bool, is_summed_up: bool = False) -> None:
        options = {} if is_summed_up else {"summary": "none"}
        self._run.define_metric(key, step_metric=self._step_key, hidden=not is_shown, **options)

    def _row(self, report: Report, now: float) -> dict[str, Any]:
        row: dict[str, Any] = {self._step_key: report.step, **metrics.run_values(report)}
        row[f"{metrics.RUN_SECTION}/alert"] = float(self._alert_pending)
        values = self._series_values(report)
        if self._series_pace.take(report.step, now, len(values)):
            for key in values.keys() - self._series_defined:
                self._define_one(key, is_shown=False)
                self._series_defined.add(key)
            row.update(values)
            row.update(headroom(report))
        return row

    def _tables(
        self, report: Report, kinds: Mapping[str, Sequence[TensorReport]], now: float
    ) -> dict[str, TableRows | str]:
        tables: dict[str, TableRows] = {}
        is_due = bool(report.alerts) and self._alert_table_pace.take(report.step, now, urgent=True)
        if self._picture_pace.take(report.step, now):
            is_due = True
            tables[metrics.HEATMAP] = TableRows(HEATMAP_COLUMN_NAMES, self._grid.rows())
            tables[metrics.HEADROOM_KINDS] = TableRows(HEADROOM_COLUMN_NAMES, headroom_rows(kinds))
        if is_due:
            tables[metrics.TENSORS] = TableRows(TENSOR_COLUMN_NAMES, tensor_rows(report))
        # An empty table only where it replaces one that is no longer true.
        tables = {key: table for key, table in tables.items() if table.rows or key in self._shown}
        self._shown = (self._shown - set(tables)) | {key for key, table in tables.items() if table.rows}
        said = _without_numbers(report.headline)
        if said != self._verdict and self._verdict_pace.take(report.step, now, urgent=True):
            self._verdict = said
            return {**tables, metrics.VERDICT: first_screen_html(report)}
        return dict(tables)

    def _series_values(self, report: Report) -> dict[str, float]:
        groups = {metrics.BY_KIND: self._kinds.of(report)}
        groups[metrics.BY_TENSOR] = {tensor.name: [tensor] for tensor in self._chosen.of(report)}
        values = {
            series.key(self._names[series.section][name]): series.compute(tensors)
            for series, members in groups.items()
            for name, tensors in members.items()
        }
        return {key: float(value) for key, value in values.items() if value is not None}

    def _summarize(self, report: Report) -> None:
        summary = metrics.summary_values(report)
        changed = {key: value for key, value in summary.items() if self._summary.get(key) != value}
        if changed:
            self._run.summary.update(changed)
            self._summary = summary


def _writer_of(run: Any) -> Any:
    found = _WRITERS.get(run)
    return None if found is None else found()


def _without_numbers(text: str) -> str:
    """A verdict is another one when its words are."""
    return "".join(c for c in text if not c.isdigit())
