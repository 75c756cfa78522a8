"""`top`: a run in the terminal, live or after the fact: the verdict, one line of advice, and a row per kind of tensor.

Keys, where the terminal has them: q ends, k changes between kinds and tensors, s the order, f hides what is well.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from update_watch.cures import TITLES, TRAINERS, code_line
from update_watch.dashboards.frame import Frame
from update_watch.dashboards.journal.lines import AT_HISTOGRAMS, AT_TENSORS, WINDOW_START
from update_watch.dashboards.journal.reader import EmptyJournalError, JournalReader
from update_watch.dashboards.journal.scanning import scan
from update_watch.dashboards.keyboard import Keyboard
from update_watch.dashboards.offers import offers_of
from update_watch.dashboards.terminal import STYLES, Plain, need_rich
from update_watch.dashboards.unseen import standing
from update_watch.dashboards.verdict import Verdict, lr_words, verdict_of
from update_watch.naming import cut_middle, kind_labels, members_by_kind, shared_prefix
from update_watch.report import SEVERITY, Alert, Health
from update_watch.wording import size

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.table import Table

WINDOWS = 30  # of a trend
_ALERTS = 2
_FEW = 1_000  # tensors, of which all is read; of more these numbers alone
_DRAWN = frozenset({"efficiency", "since_step", "low_states"})
_POLL_SECONDS = 1.0
_KEY_SECONDS = 0.1  # between two looks at the keyboard
MOST_ROWS = 1_000  # that are not cut by the height of a terminal
_BARS, _ASCII_BARS = "▁▂▃▄▅▆▇█", "_.-:=+*#"
_UNWELL = SEVERITY.index(Health.stalling)
HELP = "q end   k kinds or tensors   s order   f what is not well"


@dataclasses.dataclass
class Choice:
    """What the keys change."""

    by_kind: bool = True
    worst_first: bool = True
    only_unwell: bool = False

    def press(self, key: str) -> bool:
        """Whether the key is one of ours."""
        if key in ("k", "\r", "\n"):
            self.by_kind = not self.by_kind
        elif key == "s":
            self.worst_first = not self.worst_first
        elif key == "f":
            self.only_unwell = not self.only_unwell
        else:
            return False
        return True


class Tail(NamedTuple):
    """The end of a journal."""

    last: Frame
    frames: tuple[Frame, ...]  # the last windows, oldest first, without their sentences
    alerts: tuple[Alert, ...]  # the last few, newest first
    run: dict[str, Any]


def top(
    journal_path: Path,
    once: bool = False,
    console: Console | None = None,
    keep_going: Callable[[], bool] = lambda: True,
) -> None:
    """Show the end of a journal, and go on with every new window until q or Ctrl-C.

    Args:
        once: show it once and return. Otherwise a journal that is not there yet is waited for.
        keep_going: asked every now and then; ends when it says no.

    Raises:
        JournalError, OSError: the journal cannot be read.
        ImportError: rich is missing.
    """
    need_rich()
    from rich.console import Console

    path = Path(journal_path)
    console = console or Console()
    if once:
        console.print(view(read_tail(path), Choice(), path.stem))
        return
    with suppress(KeyboardInterrupt):
        if console.is_terminal:
            _follow_live(path, console, keep_going)
        else:
            for tail in _changes(path, keep_going):
                if tail is not None:
                    console.print(view(tail, Choice(), path.stem))


def _follow_live(path: Path, console: Console, keep_going: Callable[[], bool]) -> None:
    from rich.live import Live
    from rich.text import Text

    choice, shown, drawn = Choice(), None, 0.0
    with (
        Live(Text(f"Waiting for {path} ..."), console=console, screen=True, auto_refresh=False) as live,
        Keyboard() as keyboard,
    ):
        live.refresh()
        for tail in _changes(path, keep_going, keyboard.wait):
            key = keyboard.take()
            if key == "q":
                return
            is_new = choice.press(key) if key else False
            shown = tail or shown
            # its age goes on while nothing else happens
            if shown is not None and (tail is not None or is_new or time.monotonic() - drawn > 1.0):
                drawn = time.monotonic()
                live.update(view(shown, choice, path.stem, is_live=True), refresh=True)


def _changes(
    path: Path, keep_going: Callable[[], bool], wait: Callable[[float], None] = time.sleep
) -> Iterator[Tail | None]:
    """The end of the file whenever it has changed, and None in between."""
    seen: object = None
    looked = -math.inf
    while keep_going():
        tail = None
        if time.monotonic() - looked >= _POLL_SECONDS:
            looked = time.monotonic()
            with suppress(FileNotFoundError, EmptyJournalError):
                found = path.stat()
                if (found.st_size, found.st_mtime_ns) != seen:
                    seen = (found.st_size, found.st_mtime_ns)
                    tail = read_tail(path)
        yield tail
        wait(min(_KEY_SECONDS, _POLL_SECONDS))


def read_tail(path: Path, windows: int = WINDOWS) -> Tail:
    """The last windows of a journal and the last alerts, without parsing the rest.

    Raises:
        JournalError: not a journal, or of a newer version; EmptyJournalError: without a window so far.
        OSError: it cannot be read.
    """
    last: collections.deque[int] = collections.deque(maxlen=windows)
    alerted: collections.deque[int] = collections.deque(maxlen=_ALERTS + 1)
    with open(path, "rb") as file:
        for found in scan(file, lambda _, head: AT_TENSORS if head.startswith(WINDOW_START) else None):
            if found.is_ended and found.text.startswith(WINDOW_START):
                last.append(found.number)
                if b'"alerts":[{' in found.text:
                    alerted.append(found.number)
    reader = JournalReader(path)
    frames: list[Frame] = []
    alerts: list[Alert] = []
    for frame in standing(reader.frames({*last, *alerted}.__contains__, numbers=("efficiency",))):
        # resumed from an earlier checkpoint: what was there before is no part of this run
        frames = [f for f in frames if f.step < frame.step]
        alerts = [alert for alert in alerts if alert.step < frame.step] + list(frame.alerts)
        frames.append(frame)
    if not frames:
        raise reader.without_windows()
    newest = reader.newest(frames[-1], AT_HISTOGRAMS, _DRAWN if len(frames[-1].table.name) > _FEW else None)
    return Tail(newest, tuple(frames[-windows:]), tuple(alerts[: -_ALERTS - 1 : -1]), reader.run)


# --- what is shown -------------------------------------------------------------------------------------------


class Line(NamedTuple):
    """A row of the table."""

    name: str
    tensors: int
    health: Health
    unwell: int
    arrived: float  # of the worst
    trend: tuple[float, ...]
    since: float


def view(tail: Tail, choice: Choice, name: str, is_live: bool = False) -> RenderableType:
    """What `top` shows, for the width and height it is given."""
    return _View(tail, choice, str(tail.run.get("name") or name), is_live)


def lines_of(tail: Tail, choice: Choice, most: int | None = None) -> tuple[list[Line], int]:
    """The rows, kinds or tensors, worst first or in the order of the model, at most `most` of them; how many there are."""
    frame = tail.last
    names = frame.table.name
    now, health = frame.tensors.numbers["efficiency"], frame.tensors.health
    rank = np.lexsort((np.where(np.isnan(now), 9.0, now), health)).argsort()  # place of each tensor, the worst first
    groups: list[Any]
    if choice.by_kind:
        by_kind = members_by_kind(names)
        found, groups = kind_labels(by_kind), [np.array(members) for members in by_kind.values()]
        labels = [found[kind] for kind in by_kind]
        worst = np.array([members[rank[members].argmin()] for members in groups], dtype=np.intp)
        unwell = np.array([(health[members] <= _UNWELL).sum() for members in groups], dtype=np.intp)
    else:
        worst, unwell = np.arange(len(names)), (health <= _UNWELL).astype(np.intp)
        groups = []
    chosen = np.flatnonzero(unwell) if choice.only_unwell else np.arange(len(worst))
    if choice.worst_first:
        chosen = chosen[rank[worst[chosen]].argsort()]
    # a window whose tensors are others says nothing of these
    frames = [f for f in tail.frames if f.table is frame.table or f.table == frame.table]
    efficiency = [np.where(np.isnan(v), np.inf, v) for v in (f.tensors.numbers["efficiency"] for f in frames)]
    prefix = len(shared_prefix(names))
    lines = []
    for k in chosen[:most].tolist():
        i = int(worst[k])
        members = groups[k] if choice.by_kind else np.array([i])
        trend = np.array([values[members].min() for values in efficiency])
        lines.append(
            Line(
                labels[k] if choice.by_kind else names[i][prefix:],
                len(members),
                SEVERITY[health[i]],
                int(unwell[k]),
                float(now[i]),
                tuple(np.where(np.isinf(trend), np.nan, trend).tolist()),
                float(frame.tensors.numbers["since_step"][i]),
            )
        )
    return lines, len(chosen)


def cure_words(verdict: Verdict, frame: Frame, trainer: str, rule: str = "") -> str:
    """One line of what to change; empty where nothing is to be."""
    for cure, cost in offers_of(frame, verdict)[:1]:
        text = f"{TITLES[cure]} (+{size(cost)})"
        return f"{text}: {code_line(cure, trainer, rule)}" if trainer in TRAINERS else text
    advice = verdict.groups[0].advice if verdict.groups else ""
    return (advice.partition("; ")[2] or advice).rstrip(".")


class _View:
    def __init__(self, tail: Tail, choice: Choice, name: str, is_live: bool) -> None:
        self._tail, self._choice, self._name, self._is_live = tail, choice, name, is_live

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        from rich.text import Text

        tail, plain = self._tail, Plain(options.ascii_only)
        frame, width = tail.last, options.max_width
        verdict = verdict_of(frame)
        yield Text.assemble((verdict.health.value.upper(), STYLES[verdict.health]), "  ", plain(verdict.sentence))
        head = 2
        for label, text in (
            ("", verdict.reason),
            ("fix  ", cure_words(verdict, frame, *(str(tail.run.get(key, "")) for key in ("trainer", "optimizer")))),
        ):
            if text:
                yield Text(plain.head(label + text, width), no_wrap=True)
                head += 1
        yield Text(plain(self._summary()), style="dim")
        for alert in tail.alerts:
            yield Text(plain.head(f"alert at step {alert.step:,}: {alert.title}", width), style="yellow", no_wrap=True)
        if not frame.table.name:
            return
        yield Text("")
        room = MOST_ROWS
        if self._is_live:
            height = options.height or console.size.height
            wrapped = -(-(len(verdict.sentence) + 12) // max(20, width)) - 1
            room = max(3, height - head - len(tail.alerts) - 6 - wrapped)
        lines, count = lines_of(tail, self._choice, room)
        yield _rows(lines, width, plain, "kind" if self._choice.by_kind else "tensor")
        if count > len(lines):
            yield Text(plain(f"{count - len(lines):,} more"), style="dim")
        if self._is_live:
            yield Text(plain.head(HELP, width), style="dim", no_wrap=True)

    def _summary(self) -> str:
        frame = self._tail.last
        parts = [self._name, f"step {frame.step:,}", f"{len(frame.table.name):,} tensors"]
        if not math.isnan(frame.run.efficiency):
            parts.append(f"arrived {100 * max(0.0, frame.run.efficiency):.0f}%")
        if not math.isnan(frame.run.lr):
            parts.append(f"lr {lr_words(frame.run.lr) if frame.run.lr else '0'}")
        earlier = [f.time for f in self._tail.frames if f.step == frame.begin and f.time > 0]
        if earlier and frame.time > earlier[-1]:
            parts.append(f"{frame.window:,} steps in {_seconds(frame.time - earlier[-1])}")
        if frame.time > 0 and self._is_live:
            parts.append(f"updated {_seconds(max(0.0, time.time() - frame.time))} ago")
        if frame.cost_ms is not None:
            parts.append(f"watching {frame.cost_ms:.2g} ms a step")
        return " · ".join(parts)


def _seconds(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _rows(lines: Sequence[Line], width: int, plain: Plain, by: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, header_style="dim")
    has_trend, has_since = width >= 72, width >= 100
    trend_width = WINDOWS if width >= 110 else 16
    others = 34 + (trend_width + 2 if has_trend else 0) + (14 if has_since else 0)
    name_width = max(12, min(max((len(line.name) for line in lines), default=6), width - others, 52))
    table.add_column(by, no_wrap=True, max_width=name_width)
    table.add_column("not well", justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("arrived", justify="right", no_wrap=True)
    if has_trend:
        table.add_column("last windows", no_wrap=True)
    if has_since:
        table.add_column("since step", justify="right", no_wrap=True)
    for line in lines:
        cells: list[Text | str] = [
            Text(cut_middle(plain(line.name), name_width, plain.dots)),
            f"{line.unwell:,} of {line.tensors:,}",
            Text(line.health.value, style=STYLES[line.health]),
            plain.dash if math.isnan(line.arrived) else f"{100 * max(0.0, line.arrived):.0f}%",
        ]
        if has_trend:
            cells.append(Text(sparkline(line.trend[-trend_width:], plain.is_ascii), style=STYLES[line.health]))
        if has_since:
            cells.append(plain.dash if math.isnan(line.since) else f"{line.since:,.0f}")
        table.add_row(*cells)
    return table


def sparkline(values: Sequence[float], is_ascii: bool = False) -> str:
    """One character a value, from 0 to 1; a space where it is not known."""
    bars = _ASCII_BARS if is_ascii else _BARS
    top_bar = len(bars) - 1
    return "".join(" " if math.isnan(v) else bars[round(min(1.0, max(0.0, v)) * top_bar)] for v in values)
