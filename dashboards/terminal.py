"""The terminal's view of a report: a table with the worst tensors first, and `top`, which follows a journal.

Rich is imported when it is used. Names from a run are shown as plain text: neither Rich's markup nor a terminal's
escape sequences in them are obeyed.
"""

from __future__ import annotations

import collections
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from update_watch.dashboards.frame import report_of
from update_watch.dashboards.journal.journal import EmptyJournalError, JournalReader
from update_watch.report import SEVERITY, Alert, Health, Report, TensorReport
from update_watch.wording import printable

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table
    from rich.text import Text

STYLES = {
    Health.broken: "bold magenta",
    Health.stalled: "bold red",
    Health.stalling: "yellow",
    Health.unknown: "dim",
    Health.idle: "cyan",
    Health.frozen: "blue",
    Health.healthy: "green",
}
ROWS = 20
_ADVICES = 3  # sentences below a table that has no room for a column of them
_ALERTS = 3
_POLL_SECONDS = 1.0
_WIDE, _USUAL, _NARROW = 150, 100, 72  # columns of the terminal


def table(report: Report, rows: int | None = ROWS) -> RenderableType:
    """The verdict and the tensors, worst first, for `rich.print`.

    Args:
        rows: tensors shown; the others are counted. None: all.

    Raises:
        ImportError: rich is missing.
    """
    _need_rich()
    return _View(report, rows)


def top(
    journal_path: Path,
    once: bool = False,
    console: Console | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Show the last window of a journal, and go on with every new one until interrupted (Ctrl-C).

    Args:
        once: show it once and return. Otherwise a journal that is not there yet is waited for.
        keep_going: asked once a second; ends when it says no.

    Raises:
        JournalError, OSError: the journal cannot be read.
        ImportError: rich is missing.
    """
    _need_rich()
    from rich.console import Console

    path = Path(journal_path)
    console = console or Console()
    if once:
        console.print(_view(path, ROWS))
        return
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            _follow_live(path, console, keep_going)
        else:
            for view in _changes(path, keep_going, ROWS):
                console.print(view)


def _follow_live(path: Path, console: Console, keep_going: Callable[[], bool]) -> None:
    from rich.live import Live
    from rich.text import Text

    with Live(Text(f"Waiting for {path} ..."), console=console, screen=True, auto_refresh=False) as live:
        live.refresh()
        for view in _changes(path, keep_going, None):
            live.update(view, refresh=True)


def _changes(path: Path, keep_going: Callable[[], bool], rows: int | None) -> Iterator[RenderableType]:
    """A view for every state of the file that has a window."""
    seen: object = None
    while keep_going():
        with suppress(FileNotFoundError, EmptyJournalError):
            found = path.stat()
            if (found.st_size, found.st_mtime_ns) != seen:
                seen = (found.st_size, found.st_mtime_ns)
                yield _view(path, rows)
        time.sleep(_POLL_SECONDS)


def _view(path: Path, rows: int | None) -> RenderableType:
    last = read_last(path)
    return _View(last.report, rows, last.alerts, str(last.run.get("name") or path.stem), fits_height=rows is None)


class Last(NamedTuple):
    """The end of a journal."""

    report: Report
    alerts: tuple[Alert, ...]  # the last few, newest first
    run: dict[str, Any]


def read_last(path: Path) -> Last:
    """The last window of a journal and the last alerts, without parsing the rest.

    Raises:
        JournalError: not a journal, or of a newer version; EmptyJournalError: without a window so far.
        OSError: it cannot be read.
    """
    last: collections.deque[int] = collections.deque(maxlen=4)  # a few, in case the last is damaged
    alerted: collections.deque[int] = collections.deque(maxlen=_ALERTS)
    with open(path, "rb") as file:
        for number, raw in enumerate(file, start=1):
            if raw.startswith(b'{"kind":"window"') and raw.endswith(b"\n"):
                last.append(number)
                if b'"alerts":[{' in raw:
                    alerted.append(number)
    wanted = {*last, *alerted}
    reader = JournalReader(path)
    report: Report | None = None
    alerts: list[Alert] = []
    for frame in reader.frames(wanted.__contains__, set(last).__contains__):
        if report is not None and frame.step <= report.step:  # resumed from an earlier checkpoint
            alerts = [alert for alert in alerts if alert.step < frame.step]
        alerts += frame.alerts
        report = report_of(frame)
    if report is None:
        raise EmptyJournalError(
            f"{path} holds no window yet: the first is written when the first window of steps closes."
        )
    return Last(report, tuple(alerts[: -_ALERTS - 1 : -1]), reader.run)


def worst_first(tensors: Sequence[TensorReport]) -> list[TensorReport]:
    """By health, then by efficiency, then larger ones first."""
    return sorted(
        tensors,
        key=lambda t: (SEVERITY.index(t.health), math.inf if t.efficiency is None else t.efficiency, -t.numel),
    )


class _View:
    """Lays a report out for the width (and height) it is given."""

    def __init__(
        self,
        report: Report,
        rows: int | None,
        alerts: Sequence[Alert] = (),
        name: str = "",
        fits_height: bool = False,
    ) -> None:
        self._report, self._rows, self._alerts, self._name, self._fits_height = report, rows, alerts, name, fits_height

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        report, plain = self._report, _Plain(options.ascii_only)
        yield Text.assemble((report.health.value, STYLES[report.health]), " ", plain(report.headline))
        yield Text(plain(_summary(report, self._name)), style="dim")
        for alert in self._alerts:
            yield Text(
                plain(f"alert at step {alert.step:,}: {alert.title}"), style="yellow", no_wrap=True, overflow="fold"
            )
        if not report.tensors:
            return
        yield Text("")
        ordered = worst_first(report.tensors)
        shown = ordered[: self._limit(console, options)]
        yield _table(shown, options.max_width, plain)
        if len(shown) < len(ordered):
            yield Text(plain(f"not shown: {_counted(ordered[len(shown) :])}"), style="dim")
        if options.max_width < _WIDE:
            for sentence in _advices(shown):
                yield Text("")
                yield Text(plain(sentence))

    def _limit(self, console: Console, options: ConsoleOptions) -> int:
        if self._fits_height and console.is_terminal:
            # verdict, summary, alerts, head and foot of the table, advice
            height: int = options.height or console.size.height
            return max(3, height - 16 - len(self._alerts))
        return len(self._report.tensors) if self._rows is None else max(0, self._rows)


class _Plain:
    """Text a terminal takes literally."""

    def __init__(self, is_ascii: bool) -> None:
        self.is_ascii = is_ascii
        self.dots = "..." if is_ascii else "…"
        self.dash = "-" if is_ascii else "–"

    def __call__(self, text: str) -> str:
        text = printable(text)
        return text.replace("·", "|").encode("ascii", "replace").decode() if self.is_ascii else text

    def tail(self, text: str, width: int) -> str:
        """The end of a name says more than its beginning."""
        text = self(text)
        return text if len(text) <= width else self.dots + text[len(text) - width + len(self.dots) :]


def _table(tensors: Sequence[TensorReport], width: int, plain: _Plain) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    is_wide, has_ratio, has_cause = width >= _WIDE, width >= _USUAL, width >= _NARROW
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False, header_style="dim")
    longest = max((len(t.name) for t in tensors), default=6)
    others = 68 if has_ratio else 49 if has_cause else 30
    name_width = max(12, min(longest, width - others, 48))
    table.add_column("tensor", no_wrap=True, max_width=name_width)
    table.add_column("health", no_wrap=True)
    table.add_column("efficiency" if has_ratio else "effic.", justify="right", no_wrap=True)
    table.add_column("lost", justify="right", no_wrap=True)
    if has_ratio:
        table.add_column("update ratio", justify="right", no_wrap=True)
    if has_cause:
        table.add_column("cause", no_wrap=True)
    if is_wide:
        table.add_column("advice", ratio=1)
    said: set[str] = set()
    for t in tensors:
        cells: list[Text | str] = [
            Text(plain.tail(t.name, name_width)),
            Text(t.health.value, style=STYLES[t.health]),
            _number(t.efficiency, ".2f", plain),
            _percent(t.lost_fraction, plain),
        ]
        if has_ratio:
            cells.append(_number(t.update_ratio, ".1e", plain))
        if has_cause:
            cells.append(t.cause.value.replace("_", " ") if t.cause else "")
        if is_wide:
            cure = _wording(t.advice)
            cells.append(Text(plain(t.advice if cure not in said else t.advice.split("; ")[0]), style="dim"))
            said.add(cure)
        table.add_row(*cells)
    return table


def _summary(report: Report, name: str) -> str:
    parts = [name] if name else []
    parts += [f"step {report.step:,}", _counted(report.tensors)]
    if report.efficiency is not None:
        parts.append(f"efficiency {report.efficiency:.2f}")
    if report.cost_ms is not None:
        parts.append(f"{report.cost_ms:.2g} ms/step for watching")
    return " · ".join(parts)


def _counted(tensors: Sequence[TensorReport]) -> str:
    counts = collections.Counter(t.health for t in tensors)
    each = ", ".join(f"{counts[h]:,} {h}" for h in SEVERITY if counts[h])
    return f"{len(tensors):,} tensors: {each}" if len(tensors) != 1 else f"1 tensor: {each}"


def _advices(tensors: Sequence[TensorReport]) -> list[str]:
    """What to do about the shown tensors, once per wording."""
    found: dict[str, str] = {}
    for t in tensors:
        if t.advice:
            found.setdefault(_wording(t.advice), f"{t.name}: {t.advice}")
    return list(found.values())[:_ADVICES]


def _wording(advice: str) -> str:
    """A sentence without its numbers."""
    return "".join(c for c in advice if not c.isdigit())


def _number(value: float | None, form: str, plain: _Plain) -> str:
    return plain.dash if value is None or not math.isfinite(value) else format(value + 0.0, form)


def _percent(share: float | None, plain: _Plain) -> str:
    if share is None or not math.isfinite(share):
        return plain.dash
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%"


def _need_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError("The terminal's table needs rich: pip install 'update-watch[terminal]'") from error
