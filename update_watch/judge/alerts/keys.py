"""What may be in an episode, told apart by a number: tensors, their accumulators, and what is said of the run as a whole.

A window's thousands are known by these numbers, and their texts are made when one comes for the first time.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from update_watch.judge.columns.codes import Mask, Rows


class Keys:
    """A number for each key; a set of keys is a mask, in which those that came later are missing till it is `grown`."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}
        self._texts: list[str] = []
        self._names: Sequence[str] = ()  # of the window before
        self._of_part: dict[str, Rows] = {}  # of these

    def of(self, names: Sequence[str], part: str = "") -> Rows:
        """[n] the keys of tensors, or of what of each is called `part`."""
        if names != self._names:
            self._names, self._of_part = names, {}
        found = self._of_part.get(part)
        if found is None:
            found = self._of_part[part] = self.numbers([f"{name} [{part}]" for name in names] if part else names)
        return found

    def numbers(self, texts: Iterable[str]) -> Rows:
        """Those of these keys; new ones get the next."""
        found = [self._numbers.setdefault(text, len(self._numbers)) for text in texts]
        if len(self._numbers) > len(self._texts):
            self._texts = list(self._numbers)
        return np.array(found, dtype=np.intp)

    def mask(self, numbers: Rows) -> Mask:
        """The set of these."""
        found = np.zeros(len(self._texts), bool)
        found[numbers] = True
        return found

    def grown(self, mask: Mask) -> Mask:
        """The same set, with room for all there are."""
        return np.concatenate([mask, np.zeros(len(self._texts) - len(mask), bool)])

    def texts(self, mask: Mask) -> list[str]:
        """The keys of a set, sorted."""
        return sorted(map(self._texts.__getitem__, np.flatnonzero(mask).tolist()))
