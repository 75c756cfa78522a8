"""Names as W&B wants them.

W&B sorts and filters columns well only for `[_a-zA-Z][_a-zA-Z0-9]*`, reads a dot as nesting, and does not
tell upper from lower case. Tensor names have dots, and two of them may be equal once the dots are gone.
"""

from __future__ import annotations

import hashlib
import re


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
