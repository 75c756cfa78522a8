"""What a journal's line says of the run as a whole: its numbers, a forecast, where it is heading."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

from update_watch.dashboards.frame import Outlook
from update_watch.dashboards.journal.checks import HUGE, float_of, number_of, text_of, texts_of, whole_of
from update_watch.dashboards.run_numbers import NUMBERS, RunNumbers
from update_watch.foresight.divergence import Divergence, Sign
from update_watch.report import SEVERITY

_OF_RUN = ("made_at", "stalling_share", "lost_share", "from_step", "floor")  # of a forecast
_HEADING = tuple(field.name for field in dataclasses.fields(Divergence) if field.name not in ("step", "signs"))
_POINTS = 1_000  # of a forecast
_SIGNS = 100  # of a divergence, and tensors of one


def short(value: float | None) -> float | None:
    """Four significant digits."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def run_line(run: RunNumbers) -> dict[str, Any]:
    """What is known of a window's numbers for the run as a whole."""
    line: dict[str, Any] = {name: short(getattr(run, name)) for name in NUMBERS}
    return {**{k: v for k, v in line.items() if v is not None}, "counts": [round(n, 2) for n in run.counts]}


def run_of(line: Any) -> RunNumbers:
    counts = [float(n) for n in line["counts"]]
    values = [float_of(line.get(name)) for name in NUMBERS]
    if len(counts) != len(SEVERITY) or any(abs(v) >= HUGE for v in values) or not all(0 <= n < HUGE for n in counts):
        raise ValueError("damaged window (numbers of the run)")
    return RunNumbers(**dict(zip(NUMBERS, values, strict=True)), counts=tuple(counts))


def outlook_line(outlook: Outlook) -> dict[str, Any]:
    """What a forecast says of the run, to four digits."""
    course = [[step, short(efficiency), short(rate)] for step, efficiency, rate in outlook.course]
    line = {"until": outlook.until, "headline": outlook.headline, "course": course, "error": short(outlook.error)}
    more = {name: getattr(outlook, name) for name in _OF_RUN}
    more = {name: value if isinstance(value, int) else short(value) for name, value in more.items()}
    return line | {name: value for name, value in more.items() if value is not None}


def outlook_of(line: Any) -> Outlook:
    course = tuple((whole_of(step), number_of(arrived), number_of(rate)) for step, arrived, rate in line["course"])
    if len(course) > _POINTS or any(a[0] >= b[0] for a, b in itertools.pairwise(course)):
        raise ValueError("damaged window (its forecast)")
    error = line.get("error")

    def said(name: str) -> float | None:
        return number_of(line[name]) if name in line else None

    def step(name: str) -> int | None:
        return whole_of(line[name]) if name in line else None

    return Outlook(
        whole_of(line["until"]),
        text_of(line["headline"]),
        course,
        None if error is None else number_of(error),
        step("made_at"),
        said("stalling_share"),
        said("lost_share"),
        step("from_step"),
        said("floor"),
    )


def divergence_line(found: Divergence) -> dict[str, Any]:
    """What is known of where the run is heading, to four digits."""
    line: dict[str, Any] = {name: short(getattr(found, name)) for name in _HEADING}
    line = {"step": found.step} | {name: value for name, value in line.items() if value is not None}
    if found.signs:
        line["signs"] = [[sign.name, sign.is_warning, sign.text, list(sign.tensors)] for sign in found.signs]
    return line


def divergence_of(line: Any) -> Divergence:
    known = {name: number_of(line[name]) for name in _HEADING if name in line}
    signs = line.get("signs", [])
    if len(signs) > _SIGNS or any(len(tensors) > _SIGNS for *_, tensors in signs):
        raise ValueError("damaged window (where the run is heading)")
    return Divergence(
        step=whole_of(line["step"]),
        **known,
        signs=tuple(
            Sign(text_of(name), bool(is_warning), text_of(text), tuple(texts_of(tensors)))
            for name, is_warning, text, tensors in signs
        ),
    )
