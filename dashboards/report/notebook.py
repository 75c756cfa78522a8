"""The first screen as a few lines of HTML, for the output of a notebook's cell: no script, no style sheet."""

from __future__ import annotations

import html
from typing import Any

from update_watch.dashboards.report.first_screen import first_screen
from update_watch.dashboards.report.history import history_of
from update_watch.report import Report

_CODE = "background:#8881;border:1px solid #8884;border-radius:6px;padding:8px 12px;margin:6px 0"


def first_screen_html(report: Report, run: dict[str, Any] | None = None) -> str:
    """Verdict, reason and cure of one window. Every text is escaped."""
    screen = first_screen(history_of([report], "now", run=run))
    facts = " · ".join(screen.facts)
    lines = [
        f"<div><p><b>{html.escape(screen.verdict.health.value.upper())}</b> "
        f"<span style='font-size:1.2em'>{html.escape(screen.verdict.sentence)}</span></p>",
        f"<p style='opacity:.75'>{html.escape(facts)}</p>",
    ]
    for text in (screen.verdict.reason, screen.margin):
        if text:
            lines.append(f"<p>{html.escape(text)}</p>")
    cure = screen.cure
    if cure is not None and cure.options:
        option, (trainer, title) = cure.options[0], cure.trainers[0]
        code = cure.codes.get(option.key, {}).get(trainer, "")
        lines.append(
            f"<p>{html.escape(option.meaning)} ({html.escape(option.cost)}; {html.escape(title)}):</p>"
            f"<pre style='{_CODE}'>{html.escape(code)}</pre>"
        )
    elif cure is not None:
        lines.append(f"<p>{html.escape(cure.sentence)}.</p>")
    return "".join(lines) + "</div>"
