"""Files that are written over: never what they are made from, and only an earlier one of their own kind.

What was made here says so at its beginning: journals in their header, reports in a `generator`, pictures in a text
chunk. A path is its file, however it is spelled: links, hard links and relative paths are looked through.
"""

from __future__ import annotations

import os
import struct
import tempfile
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

from update_watch.dashboards.journal.lines import START

GENERATOR = '<meta name="generator" content="update-watch">'  # in the head of every report
_BEGINNING = 2048  # bytes in which a file says what it is
_PNG = b"\x89PNG\r\n\x1a\n"
_AFTER_HEADER = 33  # bytes of a PNG's signature and header chunk
_SOFTWARE = b"Software\0update-watch"


Kind = Literal["report", "picture", "journal"]


class OutputError(ValueError):
    """A file that must not be written over; the message names it and the remedy."""


def check_output(path: Path, kind: Kind, option: str, inputs: Sequence[Path] = (), overwrite: bool = False) -> None:
    """Refuse to write a `kind` made from `inputs` to `path`, where that would destroy something.

    Args:
        option: how the path was given, "--output".
        overwrite: replace a file of another kind or maker too, but never an input.

    Raises:
        OutputError: it is one of `inputs`, a folder, or a file that is no earlier `kind` of ours.
    """
    for other in inputs:
        if _is_same(path, other):
            raise OutputError(
                f"{option} {path} is the file that is read ({other}); name another file, nothing was written"
            )
    if path.is_dir():
        raise OutputError(f"{option} {path} is a folder; name a file in it")
    if not overwrite and os.path.lexists(path) and not is_ours(path, kind):
        raise OutputError(
            f"{option} {path} is there already and is no {kind} made by update-watch; name another file, or write over"
            " it with --force"
        )


def is_ours(path: Path, kind: Kind) -> bool:
    """Whether it is a `kind` made by us, or an empty file."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(_BEGINNING)
    if not beginning:
        return True
    if kind == "journal":
        return beginning.startswith(START)
    if kind == "picture":
        return beginning.startswith(_PNG) and _SOFTWARE in beginning[: _AFTER_HEADER + 64]
    return GENERATOR.encode() in beginning and not beginning.startswith(START)


def signed_png(picture: bytes) -> bytes:
    """The picture with a text chunk that says who made it."""
    if not picture.startswith(_PNG):
        return picture
    chunk = b"tEXt" + _SOFTWARE
    text = struct.pack(">I", len(_SOFTWARE)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return picture[:_AFTER_HEADER] + text + picture[_AFTER_HEADER:]


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: whoever opens it sees the old one or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):  # a full disk names no file, and ours is gone
            error.filename, error.filename2 = str(path), None
        raise


def _is_same(path: Path, other: Path) -> bool:
    if os.path.realpath(path) == os.path.realpath(other):
        return True  # also where neither is there yet
    try:
        return os.path.samefile(path, other)
    except OSError:
        return False
