"""The terminal's view of a report: a table with the worst tensors first. `top` follows a journal.

Rich is imported when it is used. Names from a run are shown as plain text: neither Rich's markup nor a terminal's
escape sequences in them are obeyed.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from update_watch.naming import cut_middle
from update_watch.report import SEVERITY, Health, Report, TensorReport
from update_watch.wording import cause_label, printable

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
_WIDE, _USUAL, _NARROW = 150, 100, 72  # columns of the terminal


def table(report: Report, rows: int | None = ROWS) -> RenderableType:
    """The verdict and the tensors, worst first, for `rich.print`.

    Args:
        rows: tensors shown; the others are counted. None: all.

    Raises:
        ImportError: rich is missing.
    """
    need_rich()
    return _View(report, rows)


def worst_first(tensors: Sequence[TensorReport]) -> list[TensorReport]:
    """By health, then by efficiency, then larger ones first."""
    return sorted(
        tensors,
        key=lambda t: (SEVERITY.index(t.health), math.inf if t.efficiency is None else t.efficiency, -t.numel),
    )


class _View:
    """Lays a report out for the width it is given."""

    def __init__(self, report: Report, rows: int | None) -> None:
        self._report, self._rows = report, rows

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        report, plain = self._report, Plain(options.ascii_only)
        yield Text.assemble((report.health.value, STYLES[report.health]), " ", plain(report.headline))
        yield Text(plain(_summary(report)), style="dim")
        if not report.tensors:
            return
        yield Text("")
        ordered = worst_first(report.tensors)
        shown = ordered if self._rows is None else ordered[: max(0, self._rows)]
        yield _table(shown, options.max_width, plain)
        if len(shown) < len(ordered):
            yield Text(plain(f"not shown: {_counted(ordered[len(shown) :])}"), style="dim")
        if options.max_width < _WIDE:
            for sentence in _advices(shown):
                yield Text("")
                yield Text(plain(sentence))


class Plain:
    """Text a terminal takes literally."""

    def __init__(self, is_ascii: bool) -> None:
        self.is_ascii = is_ascii
        self.dots = "..." if is_ascii else "…"
        self.dash = "-" if is_ascii else "–"

    def __call__(self, text: str) -> str:
        text = printable(text)
        return text.replace("·", "|").encode("ascii", "replace").decode() if self.is_ascii else text

    def head(self, text: str, width: int) -> str:
        """As much of a line as there is room for."""
        text = self(text)
        return text if len(text) <= width else text[: max(0, width - len(self.dots))] + self.dots


def _table(tensors: Sequence[TensorReport], width: int, plain: Plain) -> Table:
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
            Text(cut_middle(plain(t.name), name_width, plain.dots)),
            Text(t.health.value, style=STYLES[t.health]),
            _number(t.efficiency, ".2f", plain),
            _percent(t.lost_fraction, plain),
        ]
        if has_ratio:
            cells.append(_number(t.update_ratio, ".1e", plain))
        if has_cause:
            cells.append(cause_label(t.cause))
        if is_wide:
            cure = _wording(t.advice)
            cells.append(Text(plain(t.advice if cure not in said else t.advice.split("; ")[0]), style="dim"))
            said.add(cure)
        table.add_row(*cells)
    return table


def _summary(report: Report) -> str:
    parts = [f"step {report.step:,}", _counted(report.tensors)]
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


def _number(value: float | None, form: str, plain: Plain) -> str:
    return plain.dash if value is None or not math.isfinite(value) else format(value + 0.0, form)


def _percent(share: float | None, plain: Plain) -> str:
    if share is None or not math.isfinite(share):
        return plain.dash
    if 0 < share < 0.005:
        return "<1%"
    return ">99%" if 0.995 <= share < 1 else f"{100 * share:.0f}%"


def need_rich() -> None:
    try:
        import rich  # noqa: F401
    except ImportError as error:
        raise ImportError("The terminal's table needs rich: pip install 'update-watch[terminal]'") from error
