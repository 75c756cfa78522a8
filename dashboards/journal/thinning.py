"""Keeping a journal bounded: past windows are joined, worst kept, until the file is half its limit.

The resolution stays even over the whole run: lines are joined up to W windows each, W the smallest power of two that
makes the file small enough. The last windows stay as they are, and so does everything that is no window. The new file
replaces the old one in one step; whoever reads the old one at that moment reads it to its end.
"""

from __future__ import annotations

import os
import re
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from update_watch.dashboards.frame import Frame, TensorTable
from update_watch.dashboards.joining import join
from update_watch.dashboards.journal.lines import decode, encode, frame_of_line, window_line
from update_watch.dashboards.journal.scanning import scan
from update_watch.dashboards.journal.table import table_of

KEPT = 16  # last windows that are never joined
_PREFIX = re.compile(rb'\{"kind":"window","step":(\d+),"windows":(\d+),')
_COARSEST = 2**40  # windows per line


def thin(path: Path, max_bytes: int) -> int:
    """Rewrite the journal at `path` to at most half of `max_bytes`, as far as joining can do it; the new size (bytes).

    Raises:
        OSError: there is no room or no right to write beside it; the journal is as it was.
    """
    path = path.resolve()  # a link stays a link
    width = _width(path, max_bytes // 2)
    size = _replace(path, width)
    # a joined window says the worst of its members and may be as long as all of them: then the estimate was too small
    windows = sum(joined for _, _, joined in window_steps(path))
    while size > 2 * max_bytes // 3 and width < windows:
        width *= 2
        size = _replace(path, width)
    return size


def _replace(path: Path, width: int) -> int:
    """Rewrite the journal, joining to `width` windows each; the new size (bytes)."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "wb") as target, open(path, "rb") as source:
            _rewrite(source, target, width, _windows(path) - KEPT)
            target.flush()
            os.fsync(target.fileno())
            size = target.tell()
        os.chmod(name, path.stat().st_mode & 0o7777)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
    return size


def window_steps(path: Path) -> list[tuple[int, int, int]]:
    """(line number, step, joined windows) of every window line, without parsing them."""
    found = []
    with open(path, "rb") as file:
        for line in scan(file):
            match = _PREFIX.match(line.text)
            if match and line.is_ended:
                found.append((line.number, int(match[1]), int(match[2])))
    return found


def _windows(path: Path) -> int:
    return len(window_steps(path))


def _width(path: Path, goal: int) -> int:
    """How many windows a line should hold for the file to be `goal` bytes large."""
    sizes: list[tuple[int, int]] = []  # (joined windows, bytes)
    others = 0
    with open(path, "rb") as file:
        for line in scan(file):
            match = _PREFIX.match(line.text)
            if match:
                sizes.append((int(match[2]), line.size))
            else:
                others += line.size
    tail = sum(size for _, size in sizes[-KEPT:])
    width = 2
    while width < _COARSEST:
        joined = sum(size * min(1.0, windows / width) for windows, size in sizes[:-KEPT])
        if joined + tail + others <= goal:
            break
        width *= 2
    return width


def _rewrite(source: BinaryIO, target: BinaryIO, width: int, joinable: int) -> None:
    """Copy, joining the first `joinable` window lines to `width` windows each."""
    tables: dict[str, TensorTable] = {}
    written: set[str] = set()
    held: Frame | None = None
    held_table = ""
    seen = 0

    def flush() -> None:
        nonlocal held
        if held is not None:
            target.write(encode(window_line(held, held_table)))
            held = None

    for raw in source:
        is_window = _PREFIX.match(raw) is not None
        seen += is_window
        if is_window and seen <= joinable:
            try:
                line = decode(raw)
                frame = frame_of_line(line, tables)
            except ValueError:
                flush()
                target.write(raw)  # damaged: left for the reader to name
                continue
            if held is not None and _can_join(held, frame, width):
                held = join(held, frame)
            else:
                flush()
                held, held_table = frame, line["table"]
            if held.windows >= width:
                flush()
            continue
        flush()
        if raw.startswith(b'{"kind":"tensors"'):
            with suppress(ValueError):
                line = decode(raw)
                digest = str(line.get("table"))
                tables[digest] = table_of(line)
                if digest in written:
                    continue
                written.add(digest)
        target.write(raw)
    flush()


def _can_join(first: Frame, second: Frame, width: int) -> bool:
    # a step that goes back is a run resumed from an earlier checkpoint
    return first.table == second.table and second.step > first.step and first.windows + second.windows <= width
