"""Which tensors are reported: by name, with shell patterns. Everything is watched; this is what is spoken of."""

from __future__ import annotations

import dataclasses
import fnmatch
import logging
from collections.abc import Iterable, Sequence
from typing import Any

from update_watch.columns.evidence_columns import Tensors, columns_of
from update_watch.evidence import WindowEvidence

logger = logging.getLogger("update_watch")


class Selection:
    """Keeps the tensors whose name fits one of `include` (None: all) and none of `exclude`.

    Patterns are those of a shell, on whole names: "*norm*", "model.layers.[01].*". Verdicts, alerts, headline and sinks then
    know nothing of the others.

    Raises:
        TypeError: patterns that are no texts.
    """

    def __init__(self, include: Any = None, exclude: Any = None) -> None:
        self._include = _patterns("include", include)
        self._exclude = _patterns("exclude", exclude) or ()
        self._kept: dict[str, bool] = {}
        self._has_warned = False

    def of(self, evidence: WindowEvidence) -> WindowEvidence:
        if self._include is None and not self._exclude:
            return evidence
        columns = columns_of(evidence.tensors)
        kept = Tensors(columns.taken([i for i, name in enumerate(columns.raw("name")) if self.keeps(name)]))
        if not kept and evidence.tensors and not self._has_warned:
            self._has_warned = True
            logger.warning(
                "update-watch: include=%r, exclude=%r leave none of the %d tensors to report, such as %r",
                *(self._include, self._exclude, len(evidence.tensors), evidence.tensors[0].name),
            )
        return dataclasses.replace(evidence, tensors=kept)

    def keeps(self, name: str) -> bool:
        found = self._kept.get(name)
        if found is None:
            is_in = self._include is None or _fits(name, self._include)
            found = self._kept[name] = is_in and not _fits(name, self._exclude)
        return found


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _patterns(argument: str, given: Any) -> tuple[str, ...] | None:
    if given is None:
        return None
    patterns = (given,) if isinstance(given, str) else given
    if not isinstance(patterns, Sequence) or not all(isinstance(one, str) for one in patterns):
        raise TypeError(f"watch({argument}={given!r}): expected a name with wildcards or a list of them, as ['*norm*']")
    return tuple(patterns)
