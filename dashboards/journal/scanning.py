"""The lines of a file that may be gigabytes large: of long ones no more is kept than is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

WHOLE = b""  # asks for a line to its end
_HEAD = 128  # bytes by which it is decided whether a line is read
_BLOCK = 2**20  # bytes; a line that lies in one is short


class Scanned(NamedTuple):
    number: int  # from 1
    at: int  # where it begins in the file
    size: int  # bytes
    text: bytes  # of a long line that was not asked for its first bytes alone
    is_ended: bool  # by a newline; the last one may still be being written
    is_cut: bool  # where it was asked to be


Asked = Callable[[int, bytes], bytes | None]


def scan(file: BinaryIO, asked: Asked = lambda number, head: None, start: int = 0) -> Iterator[Scanned]:
    """The lines in their order, from `start` on (bytes), where one begins.

    `asked` is given number and first bytes of long ones, and says up to which bytes they are wanted: `WHOLE`, or not at all
    (None). A line that has no such bytes, or does not end as an object does, is whole.
    """
    # the line begins at `begin` of the block, which begins at `at` of the file
    number, at, block, begin = 0, start, b"", 0
    while True:
        end = block.find(b"\n", begin) + 1
        if not end:  # it goes on behind the block, or begins there
            at, begin = at + begin, 0
            file.seek(at)
            block = file.read(_BLOCK)
            if not block:
                return
            end = block.find(b"\n") + 1
        number += 1
        if end:
            yield Scanned(number, at + begin, end - begin, block[begin:end], True, False)
            begin = end
            continue
        text = block[:_HEAD]
        until = asked(number, text)
        size, cut, last = _rest(file, block, until)
        block, is_ended = b"", last.endswith(b"\n")
        if last != b"}\n":
            cut = None
        if until is not None:
            file.seek(at)
            text = file.read(size if cut is None else cut)
        yield Scanned(number, at, size, text, is_ended, cut is not None)
        at += size


def _rest(file: BinaryIO, block: bytes, until: bytes | None) -> tuple[int, int | None, bytes]:
    """Of a line that begins with the block: its bytes, where `until` stands in it, and its last two bytes."""
    size, cut, kept = 0, None, max(2, len(until or b"") - 1)
    before = b""  # the last bytes of the blocks before this one
    while block:
        newline = block.find(b"\n") + 1
        if until and cut is None:
            found = (before + block).find(until)  # what lies behind the newline has another one
            cut = size - len(before) + found if found >= 0 else None
        if newline:
            return size + newline, cut, (before + block[:newline])[-2:]
        size += len(block)
        before = (before + block[-kept:])[-kept:]
        block = file.read(_BLOCK)
    return size, cut, before[-2:]
