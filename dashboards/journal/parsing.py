"""Lines of hundreds of megabytes as JSON, without the copies: long packed numbers stay where they stand in the line."""

from __future__ import annotations

import json
import os
from typing import Any

from update_watch.dashboards.journal.packing import TYPES

_LONG_LINE, _LONG_TEXT = 2**20, 2**12  # bytes from which on
_BEGINS = frozenset(b'{"%s' % kind.encode("ascii") for kind in TYPES)  # of packed numbers, up to their text
_BEGIN = 4  # bytes of each


def parsed(raw: bytes, end: bytes = b"") -> Any:
    """What `json.loads` makes of a line and its `end`, but that the text of packed numbers may be a `memoryview`.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    if len(raw) < _LONG_LINE:
        return json.loads(raw + end)
    mark = os.urandom(16).hex()  # stands for what is left out: nobody who wrote the line knows it
    texts: list[memoryview] = []
    rest: list[bytes] = []
    done, at, view = 0, raw.find(b'":"'), memoryview(raw)
    while at >= 0:
        begin = at + 3
        stop = raw.find(b'"', begin)
        if stop - begin >= _LONG_TEXT and raw[at - _BEGIN : at] in _BEGINS and raw.startswith(b'"}', stop):
            text = view[begin:stop]
            if raw.find(b"\\", begin, stop) < 0:
                rest += [raw[done:begin], f"{mark}{len(texts)}".encode("ascii")]
                texts.append(text)
                done = stop
        at = raw.find(b'":"', stop) if stop >= 0 else -1  # before there is no other quote

    def put_back(found: dict[str, Any]) -> dict[str, Any]:
        if len(found) == 1:
            ((kind, text),) = found.items()
            if isinstance(text, str) and text.startswith(mark):
                return {kind: texts[int(text[len(mark) :])]}
        return found

    return json.loads(b"".join([*rest, raw[done:], end]), object_hook=put_back if texts else None)
