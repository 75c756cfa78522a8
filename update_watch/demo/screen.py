"""What the demo shows while it runs: with rich, or plainly where rich is not installed."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from update_watch.report import SEVERITY, Report
from update_watch.wording import cause_label, fixed, number, percent


class Screen(Protocol):
    """Where the demo shows things."""

    def line(self, text: str = "") -> None:
        """A line of text, above the progress."""

    def progress(self, names: Sequence[str], total: int) -> Any:
        """A context in which `advance` shows progress: one row per name."""

    def advance(self, row: int, done: int, text: str) -> None:
        """Row `row` has done `done` of the total; `text` is its verdict by now."""

    def table(self, report: Report) -> None:
        """The headline and the tensors of a report."""


def open_screen() -> Screen:
    """A screen with rich if it is there."""
    try:
        import rich  # noqa: F401
    except ImportError:
        return PlainScreen("Shown plainly: rich is not installed (pip install 'update-watch[terminal]').")
    return RichScreen()


def verdict(report: Report | None) -> str:
    """The tensors per health, the worst first: "5 stalled, 11 healthy"."""
    if report is None:
        return "first window open"
    counts = report.counts
    return ", ".join(f"{counts[health.value]} {health}" for health in SEVERITY if counts[health.value])


class RichScreen:
    """Progress bars and tables by rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(highlight=False)
        self._bars: Any = None
        self._rows: list[Any] = []

    def line(self, text: str = "") -> None:
        self._console.print(text, markup=False, soft_wrap=not self._console.is_terminal)

    @contextmanager
    def progress(self, names: Sequence[str], total: int) -> Iterator[None]:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[verdict]}", markup=False),
        )
        with Progress(*columns, console=self._console, refresh_per_second=4, expand=True) as self._bars:
            self._rows = [self._bars.add_task(name, total=total, verdict="") for name in names]
            yield

    def advance(self, row: int, done: int, text: str) -> None:
        self._bars.update(self._rows[row], completed=done, verdict=text)

    def table(self, report: Report) -> None:
        from update_watch.dashboards.terminal import table

        self._console.print(table(report))


class PlainScreen:
    """Lines of text."""

    def __init__(self, note: str = "") -> None:
        self._names: Sequence[str] = ()
        self._shown: dict[int, str] = {}
        if note:
            self.line(note)

    def line(self, text: str = "") -> None:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()

    @contextmanager
    def progress(self, names: Sequence[str], total: int) -> Iterator[None]:
        self._names = names
        yield

    def advance(self, row: int, done: int, text: str) -> None:
        _, _, found = text.partition("  ")  # the loss changes with every step, the verdict does not
        if found != self._shown.get(row):
            self._shown[row] = found
            self.line(f"step {done}: {self._names[row]}: {text}")

    def table(self, report: Report) -> None:
        self.line(report.headline)
        width = max((len(t.name) for t in report.tensors), default=6)
        self.line(f"{'tensor':{width}}  {'health':8}  {'efficiency':>10}  {'lost':>9}  {'update':>8}  cause")
        for t in sorted(report.tensors, key=lambda t: SEVERITY.index(t.health)):
            lost = percent(t.lost_fraction) if t.lost_fraction is not None else "-"
            ratio = number(t.update_ratio) if t.update_ratio is not None else "-"
            known = fixed(t.efficiency) if t.efficiency is not None else "-"
            self.line(
                f"{t.name:{width}}  {t.health!s:8}  {known:>10}  {lost:>9}  {ratio:>8}  {cause_label(t.cause)}".rstrip()
            )
