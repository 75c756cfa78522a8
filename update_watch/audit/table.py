"""The result of an audit: one row per kind of accumulator and number format, and the table as plain text."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Any

from update_watch.cures import switch
from update_watch.report import SEVERITY, Health
from update_watch.wording import listed, printable, short, size

_FAILS = (Health.broken, Health.stalled, Health.stalling)
_WIDTH = 116  # of the table (characters)


class StallExpected(RuntimeError):
    """What `Audit.check` raises: the text is the whole audit, after one sentence on what is expected to stall."""


@dataclasses.dataclass(frozen=True)
class AuditRow:
    """One kind of accumulator in one number format at one rate."""

    component: str  # "weights", "weight decay", "state exp_avg", "gradients", "average ema", ...
    dtype: str  # "bfloat16"
    tensors: int  # how many
    bytes: int  # of all of them together; 0 of a decay, which is stored nowhere
    expected: str  # a few words
    health: Health = Health.healthy  # expected; `unknown` where it depends on the gradients
    rate: float | None = None  # learning rate; lr * weight_decay; 1 - beta; 1 - decay of an average
    lost: float | None = None  # share of the changes of that size that rounding is expected to take, 0..1
    critical_lr: float | None = None  # of weights: below it half of the updates are expected to be lost
    names: tuple[str, ...] = ()  # tensors expected not to be healthy, the worst first
    cure: str = ""
    cure_bytes: int | None = None  # what the cure costs


@dataclasses.dataclass(frozen=True)
class Audit:
    """What accumulates in a training, in which format, and what is expected to be lost. `print` it."""

    rows: tuple[AuditRow, ...]
    warnings: tuple[str, ...] = ()  # sentences: what is expected to go wrong, and the cure
    notes: tuple[str, ...] = ()  # sentences: what could not be known, and why
    seen: tuple[str, ...] = ()  # sentences: what is lost already, and will not be any further

    @property
    def health(self) -> Health:
        """The worst that is expected."""
        found = {row.health for row in self.rows}
        return next((health for health in SEVERITY if health in found), Health.healthy)

    @property
    def bytes(self) -> int:
        """Bytes of all that accumulates."""
        return sum(row.bytes for row in self.rows)

    @property
    def cure_bytes(self) -> int:
        """What all cures together cost (bytes)."""
        return sum(row.cure_bytes or 0 for row in self.rows)

    def check(self, allow: Iterable[str] | str = ()) -> None:
        """A gate for CI and job scripts: nothing is said where nothing is expected to stall.

        Args:
            allow: names with wildcards of tensors ("*norm*.weight") or of what accumulates ("weight decay", "state *")
                that may stall all the same.

        Raises:
            StallExpected: something else is expected to lose updates (health stalled, stalling or broken).
        """
        patterns = [allow] if isinstance(allow, str) else list(allow)

        def is_allowed(name: str) -> bool:
            return any(fnmatchcase(name, pattern) for pattern in patterns)

        bad: list[str] = []
        for row in self.rows:
            if row.health in _FAILS and not is_allowed(row.component):
                names = [name for name in row.names if not is_allowed(name)]
                if names or not row.names:
                    bad.append(f"{row.component} ({row.dtype}): {listed(tuple(names)) if names else row.expected}")
        if bad:
            raise StallExpected(f"expected to stall: {'; '.join(bad)}\n{self}")

    def in_short(self, trainer: str = "torch") -> str:
        """At most three lines for the start of a training: what is expected to be lost, what to change, what is not known.

        "" where nothing is expected to be lost and everything is known. `trainer`: a key of `cures.TRAINERS`.
        """
        bad = sorted((row for row in self.rows if row.health in _FAILS), key=lambda row: row.component != "weights")
        lines = []
        if bad:
            said = [f"{row.component} in {short(row.dtype)}, {row.expected.partition(';')[0]}" for row in bad]
            names = f" ({listed(bad[0].names, 2)})" if bad[0].names else ""
            lines.append(f"Expected at these settings: {said[0]}{names}{''.join(f'; {one}' for one in said[1:4])}.")
            worst = next((row for row in bad if row.cure), bad[0])
            masters = f": {switch(trainer, worst.dtype)}" if worst.cure.startswith("FP32 master") else ""
            cost = f" (+{size(worst.cure_bytes)})" if worst.cure_bytes else ""
            if worst.cure:
                lines.append(f"Fix: {worst.cure}{masters}{cost}.")
        if self.notes:
            more = f" And {len(self.notes) - 1} more of this kind." if len(self.notes) > 1 else ""
            lines.append(f"Not known before the first step: {self.notes[0]}{more}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        rows = []
        for row in self.rows:
            plain = dataclasses.asdict(row)
            plain["health"] = row.health.value
            plain["names"] = list(row.names)
            rows.append(plain)
        lost = [row.lost for row in self.rows if row.component == "weights" and row.lost is not None]
        return {
            "health": self.health.value,
            "bytes": self.bytes,
            "cure_bytes": self.cure_bytes,
            "weights_lost": max(lost, default=None),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "seen": list(self.seen),
            "rows": rows,
        }

    def __str__(self) -> str:
        table: list[tuple[str, ...]] = [("what accumulates", "format", "tensors", "size", "expected", "cure (cost)")]
        for row in self.rows:
            cost = "" if row.cure_bytes is None else f" (+{size(row.cure_bytes)})"
            table.append(
                (row.component, row.dtype, str(row.tensors), size(row.bytes) if row.bytes else "-",
                 f"{row.health}: {row.expected}", f"{row.cure}{cost}" if row.cure else "")
            )  # fmt: skip
        lines = _render(table)
        lines.append(f"{size(self.bytes)} in all; every cure together costs {size(self.cure_bytes)}.")
        for sentence in (*self.warnings, *self.notes, *self.seen):
            lines += ["", *textwrap.wrap(printable(sentence), _WIDTH, initial_indent="- ", subsequent_indent="  ")]
        return "\n".join(lines)


def _render(table: list[tuple[str, ...]]) -> list[str]:
    """Columns of text; the two last are wrapped to share what width is left."""
    fixed = [max(len(row[i]) for row in table) for i in range(4)]
    cure = min(max(len(row[5]) for row in table), 34)
    expected = max(_WIDTH - sum(fixed) - cure - 2 * 5, 24)
    lines: list[str] = []
    for index, row in enumerate(table):
        wrapped = [
            *([cell] for cell in row[:4]),
            textwrap.wrap(row[4], expected) or [""],
            textwrap.wrap(row[5], cure) or [""],
        ]
        for i in range(max(len(cell) for cell in wrapped)):
            cells = [cell[i] if i < len(cell) else "" for cell in wrapped]
            widths = [*fixed, expected, cure]
            aligned = [
                c.rjust(w) if k in (2, 3) else c.ljust(w) for k, (c, w) in enumerate(zip(cells, widths, strict=True))
            ]
            lines.append("  ".join(aligned).rstrip())
        if index == 0:
            lines.append("-" * len(lines[0]))
    return lines
