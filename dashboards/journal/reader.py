"""Reading a journal: its windows one after the other, whole or some numbers of them, and what of it is damaged."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from update_watch.dashboards.frame import TENSOR_NUMBERS, Frame, TensorTable, report_of
from update_watch.dashboards.journal.checks import whole_of
from update_watch.dashboards.journal.lines import (
    AT_ACCUMULATORS,
    FORMAT,
    SCHEMA,
    WINDOW_START,
    decode,
    frame_of_line,
)
from update_watch.dashboards.journal.scanning import WHOLE, Scanned, scan
from update_watch.dashboards.journal.table import table_of
from update_watch.dashboards.unseen import stands
from update_watch.report import Report

_LINES_NAMED = 5  # in a warning
_HEAD = 100  # bytes by which a window's line is found again: its step, its table, its time


class JournalError(ValueError):
    """A file that is not a journal this version can use."""


class EmptyJournalError(JournalError):
    """A journal without a window so far."""


def read_journal(path: str | os.PathLike[str]) -> Iterator[Report]:
    """The reports of a journal in the order of the file. A line that is still being written is left out.

    Where the journal was thinned, a report covers several windows: `window` is the number of all their steps, and each
    tensor is as in its worst one.

    Raises:
        JournalError: not a journal, or one of a newer version.
        OSError: it cannot be read.

    Warns:
        UserWarning: lines were damaged; they are skipped and their numbers are named.
    """
    reader = JournalReader(path)
    for frame in reader.frames():
        yield report_of(frame)
    reader.warn()


class JournalReader:
    """Reads a journal's windows as frames and counts what could not be read."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.run: dict[str, Any] = {}  # what the last header says about the run
        self.damaged: list[tuple[int, str]] = []  # (line number, what is wrong)
        self.missing = 0  # windows that could not be written
        # the last window: number, place, beginning, table
        self._newest: tuple[int, int, bytes, TensorTable] | None = None

    def frames(
        self, wanted: Callable[[int], bool] | None = None, numbers: Collection[str] | None = None
    ) -> Iterator[Frame]:
        """The windows, one after the other; only those on lines whose number is `wanted`.

        With `numbers`, those of the tensors that are named and nothing else of them: `newest` has the last window whole.
        """
        tables: dict[str, TensorTable] = {}
        self.run, self.damaged, self._newest, self.missing = {}, [], None, 0
        lines = 0
        is_ours = False
        last: Frame | None = None  # that something was looked at for

        def asked(number: int, head: bytes) -> bytes | None:
            if not head.startswith(WINDOW_START):
                return WHOLE
            return None if wanted is not None and not wanted(number) else WHOLE if numbers is None else AT_ACCUMULATORS

        with open(self.path, "rb") as file:
            for found in scan(file, asked):
                number, raw = found.number, found.text
                if not found.is_ended or raw.isspace():
                    continue  # an unfinished last line is no damage
                lines += 1
                if asked(number, raw) is None:
                    is_ours = True
                    continue
                try:
                    line = _decoded(found)
                    kind = line.get("kind")
                    if kind == "header":
                        self._header(line)
                    elif kind == "tensors":
                        table, digest = table_of(line), str(line.get("table"))
                        if tables.get(digest) != table:  # every process that goes on writes it again
                            tables[digest] = table
                    elif kind == "window":
                        frame = frame_of_line(line, tables, numbers)
                        if numbers is not None and not stands(last, frame):
                            last, self._newest = frame, (found.number, found.at, raw[:_HEAD], frame.table)
                        del line  # of many tensors hundreds of megabytes
                        yield frame
                    elif kind == "missing":
                        self.missing += max(whole_of(line.get("windows")), 0)
                    # other kinds carry nothing a window needs
                    is_ours = True
                except JournalError:
                    raise
                except ValueError as error:
                    self.damaged.append((number, str(error)))
        if lines and not is_ours:
            raise JournalError(f"{self.path} is not an update-watch journal: none of its {lines} lines can be read.")

    def newest(self, frame: Frame, end: bytes = WHOLE, drawn: Collection[str] | None = None) -> Frame:
        """The last of `frames` of which anything was looked at as a whole, of a long line up to its `end`; of a damaged one what can be read.

        `drawn`: the numbers of tensors and accumulators that are read, all by default; others are not known.
        """
        if self._newest is None:
            return frame
        number, at, head, table = self._newest
        for until, numbers in ((end, None), (AT_ACCUMULATORS, TENSOR_NUMBERS)):
            try:
                line = _decoded(self._again(at, head, until))
                found = frame_of_line(line, {str(line.get("table")): table}, numbers, drawn)
                return dataclasses.replace(found, until=frame.until)
            except ValueError as error:
                if numbers is None:
                    self.damaged.append((number, str(error)))
        nothing = np.full(len(table.name), np.nan)
        known = dict.fromkeys(TENSOR_NUMBERS, nothing) | dict(frame.tensors.numbers)
        return dataclasses.replace(frame, tensors=dataclasses.replace(frame.tensors, numbers=known))

    def _again(self, at: int, head: bytes, until: bytes) -> Scanned:
        """The line that begins so: it stands elsewhere where the file was thinned in between."""

        def asked(_: int, begin: bytes) -> bytes | None:
            return until if begin.startswith(head) else None

        with open(self.path, "rb") as file:
            for start in (at, 0):
                for line in scan(file, asked, start):
                    if line.text.startswith(head):
                        return line
                    if start:
                        break
        raise ValueError("its line is no longer there")

    def header(self) -> dict[str, Any]:
        """What the last header says about the run; empty where there is none."""
        for _ in self.frames(lambda number: False):
            pass
        return self.run

    def without_windows(self) -> JournalError:
        """What to raise where no window was found: they are still to come, or all of them are damaged."""
        if not self.damaged:
            return EmptyJournalError(
                f"{self.path} holds no window yet: the first is written when the first window of steps closes."
            )
        lines = ", ".join(str(number) for number, _ in self.damaged[:_LINES_NAMED])
        more = ", ..." if len(self.damaged) > _LINES_NAMED else ""
        return JournalError(
            f"{self.path}: no window of it can be read: {len(self.damaged)} lines are damaged (line {lines}{more}; the"
            f" first: {self.damaged[0][1]})"
        )

    def warn(self) -> None:
        """Warn of what was skipped, if anything was."""
        if self.damaged:
            named = ", ".join(str(number) for number, _ in self.damaged[:_LINES_NAMED])
            more = ", ..." if len(self.damaged) > _LINES_NAMED else ""
            what = "1 damaged line was" if len(self.damaged) == 1 else f"{len(self.damaged)} damaged lines were"
            warnings.warn(
                f"{self.path}: {what} skipped (line {named}{more}; the first: {self.damaged[0][1]}). "
                "The other windows are complete.",
                stacklevel=3,
            )

    def _header(self, line: Mapping[str, Any]) -> None:
        if line.get("format") != FORMAT:
            raise ValueError("header of another format")
        schema = line.get("schema")
        if not isinstance(schema, int):
            raise ValueError("header without a version")  # noqa: TRY004  # damage is one kind of error
        if schema > SCHEMA:
            raise JournalError(newer(self.path, schema))
        run = line.get("run")
        self.run = dict(run) if isinstance(run, dict) else {}


def _decoded(found: Scanned) -> dict[str, Any]:
    return decode(found.text, b"}" if found.is_cut else b"")


def newer(path: Path, schema: int) -> str:
    return (
        f"{path} was written by a newer update-watch: its schema is version {schema}, this one knows versions up to "
        f"{SCHEMA}. Upgrade: pip install -U update-watch"
    )
