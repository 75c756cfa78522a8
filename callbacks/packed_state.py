"""What is remembered between windows, in few bytes: the Trainer writes it into trainer_state.json of every checkpoint.

Plain data all the same: a text of compressed JSON in a dict. A model of 700 tensors that would take a megabyte takes kilobytes.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Mapping
from typing import Any

LIMIT = 64 * 2**20  # bytes unpacked; what is larger was not packed by us
_KEY = "zlib+base85"


def packed(memory: Mapping[str, Any]) -> dict[str, str]:
    """The state of a watch (JSON data) as one short text; empty stays empty."""
    if not memory or _KEY in memory:
        return dict(memory)
    text = json.dumps(memory, separators=(",", ":"))
    return {_KEY: base64.b85encode(zlib.compress(text.encode(), 9)).decode()}


def unpacked(memory: Mapping[str, Any]) -> dict[str, Any]:
    """What `packed` was given; state that was never packed stays as it is.

    Raises:
        ValueError: the text is damaged, or was not made by `packed`.
    """
    if _KEY not in memory:
        return dict(memory)
    try:
        engine = zlib.decompressobj()
        data = engine.decompress(base64.b85decode(memory[_KEY]), LIMIT)
        if engine.unconsumed_tail or not engine.eof:
            raise ValueError("it is cut short, or too large to be ours")
        found = json.loads(data)
    except (ValueError, TypeError, AttributeError, zlib.error) as error:
        raise ValueError(f"the callback's packed memory cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"the callback's packed memory is a {type(found).__name__} instead of a dict")
    return found
