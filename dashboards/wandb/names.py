"""Names as W&B wants them, and names grouped where there are too many.

W&B sorts and filters columns well only for `[_a-zA-Z][_a-zA-Z0-9]*`, reads a dot as nesting, and does not
tell upper from lower case. Tensor names have dots, and two of them may be equal once the dots are gone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping


class KeyNames:
    """Maps names to keys, one to one, and keeps a key for ever once it was given.

    The first name to ask for a key gets it plain; a later one that would collide gets the beginning of its own
    hash behind it, so that the same model has the same keys in every run.
    """

    def __init__(self) -> None:
        self._key_of: dict[str, str] = {}
        self._taken: set[str] = set()  # lower case

    def __getitem__(self, name: str) -> str:
        if name not in self._key_of:
            key = re.sub(r"[^0-9A-Za-z_]", "_", name) or "unnamed"
            if key.lower() in self._taken:
                key = self._apart(key, name)
            self._taken.add(key.lower())
            self._key_of[name] = key
        return self._key_of[name]

    def _apart(self, key: str, name: str) -> str:
        digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()
        lengths = range(6, len(digest) + 1)
        return next(k for k in (f"{key}_{digest[:n]}" for n in lengths) if k.lower() not in self._taken)


def group_names(layer_of: Mapping[str, str], limit: int) -> dict[str, str]:
    """Tensor name -> group name, with at most `limit` groups.

    The tensors themselves where they are few enough, else their layers, else the longest common module paths
    ("blocks.0") that are few enough. Where that would leave next to nothing to tell apart (200 blocks under one
    "blocks"), neighbours of the next finer level are joined instead ("blocks.0-3").

    Args:
        layer_of: tensor name -> module path, in model order.
        limit: number of groups, at least 1.
    """
    if len(layer_of) <= limit:
        return {name: name for name in layer_of}
    return dict(zip(layer_of, _shorten(layer_of.values(), limit), strict=False))


def _shorten(paths: Iterable[str], limit: int) -> list[str]:
    parts = [path.split(".") for path in paths]
    finer: list[str] = []
    for depth in range(max(map(len, parts)), 0, -1):
        groups = [".".join(part[:depth]) for part in parts]
        if len(set(groups)) <= limit:
            joined = _join_neighbours(finer, limit) if finer else groups
            return joined if len(set(joined)) > len(set(groups)) else groups
        finer = groups
    return _join_neighbours(finer, limit)


def _join_neighbours(groups: list[str], limit: int) -> list[str]:
    distinct = list(dict.fromkeys(groups))
    size = -(-len(distinct) // limit)  # rounded up
    chunks = [distinct[i : i + size] for i in range(0, len(distinct), size)]
    name_of = {group: _span(chunk[0], chunk[-1]) for chunk in chunks for group in chunk}
    return [name_of[group] for group in groups]


def _span(first: str, last: str) -> str:
    if first == last:
        return first
    parent, _, leaf = last.rpartition(".")
    return f"{first}-{leaf}" if parent == first.rpartition(".")[0] else f"{first}-{last}"
