"""The journal: one JSON line per window in an append-only file beside the run. Every renderer reads it.

A line leaves in one write, so another process sees whole lines (at most the last one is cut short) and a killed run
loses nothing that was closed. When the file outgrows its limit, neighbouring windows of the past are joined
(`thinning`), each tensor as in its worst window. The schema is described in docs/journal.md.
"""

from __future__ import annotations

import json
import os
import time
import warnings
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from update_watch.dashboards.frame import Frame, TensorTable, frame_of
from update_watch.dashboards.journal.lines import (
    SCHEMA,
    START,
    decode,
    encode,
    header_line,
    missing_line,
    window_line,
)
from update_watch.dashboards.journal.reader import JournalError, newer
from update_watch.dashboards.journal.table import table_line
from update_watch.dashboards.journal.thinning import thin
from update_watch.dashboards.journal.writers import is_alone
from update_watch.report import Report

MAX_BYTES = 128 * 2**20
_SHARED = (
    "Journal {}: another watch or process writes to this file too, so every window will be in it twice; give each a path of"
    " its own, or close the other"
)
_TABLES = 64  # remembered: a model whose tensors keep changing must not fill the memory


class Journal:
    """A sink that appends every report to a journal.

    The file (and its folder) is made with the first report; one that is there already is continued.

    Args:
        path: the file, "run.jsonl".
        run: what should be said about the run: plain JSON data, written as it is. Do not put secrets there.
        max_bytes: beyond this size (bytes) past windows are joined until the file is half as large; None: never.

    Example:
        watch = uw.watch(model, optimizer, sinks=[Journal("runs/gpt.jsonl", run={"name": "gpt"})])

    Calling it raises OSError when the file cannot be written (disk full, read-only folder), and `JournalError` when
    `path` is another kind of file or a journal of a newer version. What was written before stays readable; where it can be
    written again, it says how many windows are missing. A relative path is that of the folder it was made in.
    """

    closes_with_watch = True  # its file, which a later report opens again
    tries_again_after = (OSError,)  # a disk has room again

    def __init__(
        self, path: str | os.PathLike[str], run: Mapping[str, Any] | None = None, max_bytes: int | None = MAX_BYTES
    ) -> None:
        if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
            raise TypeError(f"Journal(path={path!r}) must name the file to write, such as 'run.jsonl'.")
        if max_bytes is not None and (isinstance(max_bytes, bool) or not isinstance(max_bytes, int) or max_bytes <= 0):
            raise ValueError(
                f"Journal(max_bytes={max_bytes!r}) must be a positive number of bytes, or None for no limit."
            )
        if run is not None and not isinstance(run, Mapping):
            raise ValueError(
                f"Journal(run=...) must be plain JSON data by name, such as {{'name': 'gpt'}}, not {run!r}."
            )
        try:
            self.run = json.loads(json.dumps(dict(run or {}), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"Journal(run=...) must be plain JSON data: {error}.") from None
        self.path = Path(path).absolute()
        self.max_bytes = max_bytes
        self._limit = max_bytes
        self._file: BinaryIO | None = None
        self._is_shared = False  # somebody else writes to it too
        self._tables: dict[TensorTable, str] = {}  # written since the file was opened -> digest
        self._size = 0  # bytes, after what was written last
        self._missing = 0  # windows that could not be written, and that the file does not speak of yet

    def __call__(self, report: Report) -> None:
        """Write a window."""
        try:
            self._keep(frame_of(report))
        except OSError:
            self._missing += 1
            raise
        self._missing = 0

    def _keep(self, frame: Frame) -> None:
        if self._file is not None and not self._is_in_place():
            self.close()
        if self._file is None:
            self._file = self._open()
        lines = encode(missing_line(self._missing)) if self._missing else b""
        if frame.table not in self._tables:
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            line = table_line(frame.table)
            lines += encode(line)
            self._tables[frame.table] = line["table"]
        try:
            self._write(lines + encode(window_line(frame, self._tables[frame.table])))
        except BaseException:
            self.close()
            raise
        if self._limit is not None and os.fstat(self._file.fileno()).st_size > self._limit:
            self._thin()

    def close(self) -> None:
        """Close the file; the next report opens it again."""
        file, self._file = self._file, None
        self._tables.clear()
        if file is not None:
            with suppress(OSError):
                file.close()

    def __del__(self) -> None:
        if getattr(self, "_file", None) is not None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        # goes to other processes (spawn) as settings, without the open file
        return {**self.__dict__, "_file": None, "_tables": {}}

    def _open(self) -> BinaryIO:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists() and not self.path.is_file():  # reading what a device begins with may never end
            raise JournalError(f"Journal({str(self.path)!r}) is no file but a folder, a pipe or a device; name a file.")
        file = open(self.path, "a+b", buffering=0)  # noqa: SIM115  # closed by `close`
        try:
            _check_start(self.path, file)
            self._file = file
            if not is_alone(file) and not self._is_shared:
                self._is_shared = True
                with suppress(UserWarning):  # where warnings are errors, the journal is written all the same
                    warnings.warn(_SHARED.format(self.path), stacklevel=2)
            self._write(_heal(file) + encode(header_line(self.run, time.time())))
        except BaseException:
            self.close()
            file.close()
            raise
        return file

    def _write(self, data: bytes) -> None:
        """All of `data`, or an OSError and nothing of it."""
        assert self._file is not None
        size = os.fstat(self._file.fileno()).st_size
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
        except OSError:
            with suppress(OSError):  # where even this fails, the reader and the next opening cope with half a line
                self._file.truncate(size)
            raise
        self._size = size + len(data)

    def _is_in_place(self) -> bool:
        """Whether the open file is still the one at `path`, with all that was written: nobody moved, removed or emptied it."""
        assert self._file is not None
        try:
            ours = os.fstat(self._file.fileno())
            return os.path.samestat(ours, os.stat(self.path)) and ours.st_size >= self._size
        except OSError:
            return False

    def _thin(self) -> None:
        assert self.max_bytes is not None
        self.close()
        try:
            size = thin(self.path, self.max_bytes)
        except OSError as error:
            size = self.path.stat().st_size
            warnings.warn(
                f"Journal {self.path} is {size} bytes large and could not be thinned to {self.max_bytes}: {error}. "
                "It goes on growing; make room beside it.",
                stacklevel=2,
            )
        # Where little could be joined (alerts are always kept) do not try again with every window.
        self._limit = max(self.max_bytes, size + size // 2)


def _check_start(path: Path, file: BinaryIO) -> None:
    """Refuse to append to a file that is not ours, or is of a newer version."""
    file.seek(0)
    first = file.readline()
    if not START.startswith(first[: len(START)]):
        raise JournalError(
            f"Journal({str(path)!r}): the file is there already and is not an update-watch journal. "
            "Give another path; nothing was written."
        )
    try:
        schema = decode(first).get("schema")
    except ValueError:  # a header cut short: it is written again
        return
    if isinstance(schema, int) and schema > SCHEMA:
        raise JournalError(newer(path, schema) + ", or give another path.")


def _heal(file: BinaryIO) -> bytes:
    """What must come before the next line: a newline where a killed process left half a line."""
    size = file.seek(0, os.SEEK_END)
    if size == 0:
        return b""
    file.seek(size - 1)
    return b"" if file.read(1) == b"\n" else b"\n"
