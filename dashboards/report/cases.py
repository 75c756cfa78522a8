"""What each cure would give, as the rows of a table: efficiency of the run, tensors that would still lose, bytes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from update_watch.dashboards.frame import Frame, report_of
from update_watch.dashboards.verdict import share_words
from update_watch.foresight.forecasts import Case
from update_watch.report import weighted_mean
from update_watch.wording import size

LOSES = 0.8  # efficiency under which a tensor loses updates
MOST = 20_000  # tensors, from which on the table would take longer than the rest of the page


class CaseRow(NamedTuple):
    title: str
    arrives: str  # "94%"; "about 94%" where some of it is in doubt
    between: str  # "91% to 99%", where it is not certain
    losing: str  # "3 of 12", "3 to 5 of 12"
    doubt: str  # "5 of 12", of which the efficiency is in doubt
    cost: str  # "+1.3 MB"


def case_rows(frame: Frame) -> tuple[CaseRow, ...]:
    """In the order of `Report.what_if`; empty where no low-precision weight was measured, or of too many tensors."""
    if len(frame.table.name) > MOST:
        return ()
    numel = dict(zip(frame.table.name, frame.table.numel, strict=True))
    return tuple(_row(case, numel) for case in report_of(frame).what_if() if case.tensors)


def _row(case: Case, numel: Mapping[str, int]) -> CaseRow:
    def of_run(values: Mapping[str, float]) -> str:
        """Of one tensor more than everything may arrive, which does not make up for what is lost of another."""
        mean = weighted_mean((min(max(value, 0.0), 1.0), numel[name]) for name, value in values.items())
        return share_words(mean or 0.0)

    ends = [
        {name: case.ranges.get(name, (value, value))[side] for name, value in case.tensors.items()} for side in (0, 1)
    ]
    low, high = map(of_run, ends)
    # of tensors that are sure what is said, of the others either end of their range
    doubt = set(case.in_doubt)
    most, fewest = (
        sum((end[name] if name in doubt else value) < LOSES for name, value in case.tensors.items()) for end in ends
    )
    count, arrives = f"{len(case.tensors):,}", of_run(case.tensors)
    return CaseRow(
        f"{case.title[:1].upper()}{case.title[1:]}",
        f"about {arrives}" if doubt and arrives[0].isdigit() else arrives,  # but not "about over 99%"
        f"{low} to {high}" if case.ranges and low != high else "",
        f"{fewest:,} to {most:,} of {count}" if fewest != most else f"{most:,} of {count}",
        f"{len(doubt):,} of {count}" if doubt else "",
        f"+{size(case.bytes)}",
    )
