"""The header of a safetensors file in columns: a million entries in half a second, where JSON makes objects of each.

It is read as writers nearly always write it (`{"name":{"dtype":"BF16","shape":[8],"data_offsets":[0,16]},...}`, without
blanks and escapes); what is written in another way is left to a JSON reader, and so is what is damaged.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]
_METADATA = b'{"__metadata__":'
# what stands between a name, its kind, its place and the next name: quotes, of which there are no others
_BETWEEN = (b'":{"dtype":"', b'],"data_offsets":[', b']},"')
_WITHIN_KIND, _QUOTES = '","shape":[', 3
_CUTS = bytes((1, 2, 3))  # stand for them, as no header holds such bytes
_END = b"]}}"
_LETTERS = bytes(range(ord(" "), 256))
_AS_LINES = bytes.maketrans(_CUTS, b"\n" * len(_CUTS))


class Header(NamedTuple):
    """What a header says of n tensors. Of two of one name the later one counts."""

    names: list[str]
    kinds: list[tuple[Any, ...]]  # format and lengths of each kind there is, whatever they are
    codes: IntArray  # [n]: the kind of each, its place in `kinds`
    places: IntArray  # [n, 2]: the bytes it takes up behind the header, the first and the one behind the last


def header_of(text: bytes) -> Header:
    """The header in these bytes.

    Raises:
        ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError: it is damaged.
    """
    try:
        usual = _as_usual(text)
    except (ValueError, RecursionError):
        usual = None  # a JSON reader says what is wrong
    return usual or _as_json(json.loads(text))


def _as_json(header: dict[str, Any]) -> Header:
    header.pop("__metadata__", None)
    entries = list(header.values())
    kinds, codes = _numbered([(entry["dtype"], *entry["shape"]) for entry in entries])
    if not {type(at) for entry in entries for at in entry["data_offsets"]} <= {int}:
        raise ValueError("the place of a tensor is not a whole number")
    places = np.array([entry["data_offsets"] for entry in entries], np.int64).reshape(len(entries), 2)
    return Header(list(header), kinds, codes, places)


def _as_usual(text: bytes) -> Header | None:
    """None where it is written in another way."""
    text = text.rstrip(b" ")
    begin = _begin(text)
    if (
        begin is None
        or not text.endswith(_END)
        or not text.isascii()
        or b"\\" in text
        or text.translate(None, _LETTERS)
    ):
        return None
    text = text[begin : -len(_END)]
    for between, cut in zip(_BETWEEN, _CUTS, strict=True):
        text = text.replace(between, bytes((cut,)))
    cuts = text.translate(None, _LETTERS) + _CUTS[-1:]
    if cuts != _CUTS * (len(cuts) // len(_CUTS)) or text.count(b'"') != _QUOTES * (len(cuts) // len(_CUTS)):
        return None
    parts = text.translate(_AS_LINES).decode("ascii").split("\n")
    names, places = parts[::3], parts[2::3]
    kinds, codes = _numbered(parts[1::3])
    numbers = json.loads(f"[{','.join(places)}]")
    if "__metadata__" in names or set(map(_commas, places)) != {1} or set(map(type, numbers)) != {int}:
        return None
    said = [kind.split(_WITHIN_KIND) for kind in kinds]  # in two each, or it is no entry
    lengths = [(dtype, *json.loads(f"[{shape}]")) for dtype, shape in said]
    return Header(names, lengths, codes, np.array(numbers, np.int64).reshape(len(names), 2))


_commas = operator.methodcaller("count", ",")


def _begin(text: bytes) -> int | None:
    """Where the name of the first tensor begins."""
    if not text.startswith(_METADATA):
        return 2 if text.startswith(b'{"') else None
    end = text.find(b"}", len(_METADATA)) + 1  # texts by name: nothing lies deeper
    if not end or text[end : end + 2] != b',"':
        return None
    json.loads(text[len(_METADATA) : end])
    return end + 2


def _numbered(said: Sequence[Any]) -> tuple[list[Any], IntArray]:
    """The different ones, and which of them each is."""
    code = {one: i for i, one in enumerate(dict.fromkeys(said))}
    return list(code), np.fromiter(map(code.__getitem__, said), np.int64, len(said))
