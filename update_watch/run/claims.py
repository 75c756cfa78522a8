"""Which journals the processes of one command keep: noted when they are chosen, so that no other file is taken for one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def begin() -> str:
    """A new, empty file for the notes; "" where none can be made."""
    try:
        number, path = tempfile.mkstemp(prefix="update-watch-", suffix=".journals")
    except OSError:
        return ""
    os.close(number)
    return path


def note(claims: str, journal: Path) -> None:
    """This process keeps `journal`, which it has made."""
    if claims:
        with suppress(OSError):
            number = os.open(claims, os.O_WRONLY | os.O_APPEND)  # not made anew where the command has ended before
            with open(number, "a", encoding="utf-8", errors="surrogateescape") as file:
                file.write(f"{journal}\n")  # one write at the end of the file: processes do not tear each other's lines


def end(claims: str, first: Path) -> tuple[list[Path], int]:
    """The journals that hold something, `first` at the beginning, and how many were begun.

    The notes are removed, and so are empty journals.
    """
    if not claims:
        found = [first] if _size(first) else []
        return found, len(found)
    lines = []
    with suppress(OSError):
        lines = Path(claims).read_text(encoding="utf-8", errors="surrogateescape").splitlines()
    with suppress(OSError):
        Path(claims).unlink()
    found = sorted({Path(line) for line in lines}, key=lambda path: (path != first, path))
    for path in found:
        if path.is_file() and not _size(path):  # of a process that ended before its first window
            with suppress(OSError):
                path.unlink()
    return [path for path in found if _size(path)], len(found)


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
