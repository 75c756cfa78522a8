"""The lines of a file that may be gigabytes large: those that nobody asks for are looked through and not kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

_HEAD = 128  # bytes by which it is decided whether a line is read
_BLOCK = 2**20


class Scanned(NamedTuple):
    number: int  # from 1
    size: int  # bytes
    text: bytes  # of a long line that was not asked for its first bytes alone
    is_ended: bool  # by a newline; the last one may still be being written


def scan(file: BinaryIO, is_asked: Callable[[int, bytes], bool] = lambda number, head: False) -> Iterator[Scanned]:
    """The lines in their order. `is_asked` is given number and first bytes of those that are long."""
    number, at, block, begin = 0, 0, b"", 0  # the line begins at `begin` of the block, which begins at `at` of the file
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
            yield Scanned(number, end - begin, block[begin:end], True)
            begin = end
            continue
        size, is_ended = _rest(file, len(block))
        text, block = block[:_HEAD], b""
        if is_asked(number, text):
            file.seek(at)
            text = file.read(size)
        yield Scanned(number, size, text, is_ended)
        at += size


def _rest(file: BinaryIO, size: int) -> tuple[int, bool]:
    """Bytes of a line of which so many were read; whether a newline ends it."""
    while part := file.read(_BLOCK):
        end = part.find(b"\n") + 1
        if end:
            return size + end, True
        size += len(part)
    return size, False
