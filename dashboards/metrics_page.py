"""The documentation page of what is logged: `python -m update_watch.dashboards.metrics_page > docs/metrics.md`."""

from __future__ import annotations

from update_watch.dashboards.metrics import ENTRIES, RUN_METRICS, SERIES


def markdown() -> str:
    """The table as a documentation page."""
    lines = [
        "# Metrics",
        "",
        "<!-- Made from dashboards/metrics.py: python -m update_watch.dashboards.metrics_page > docs/metrics.md -->",
        "",
        "What `WandbSink` logs, all of it under `update_watch/`. A value that is not known in a window is left out, never",
        "logged as zero. W&B draws a chart of itself for those with a tick; the others are there for charts you make.",
        "",
        "## The run",
        "",
        "| key | drawn | unit | meaning | computed as |",
        "|---|---|---|---|---|",
        *(f"| `{m.key}` | {'✓' if m.is_shown else ''} | {m.unit} | {m.meaning} | {m.formula} |" for m in RUN_METRICS),
        "",
        "## Kinds and tensors",
        "",
        'At most `max_kinds` (14) kinds and `max_tensors` (6) tensors that are not well; `tensors=("*norm*",)` asks for more.',
        "Dots in a name become underscores.",
        "",
        "| key | unit | meaning | computed as |",
        "|---|---|---|---|",
        *(f"| `{s.key('<name>')}` | {s.unit} | {s.meaning} | {s.formula} |" for s in SERIES),
        "",
        "## Pictures, tables, texts",
        "",
        "| key | kind | meaning |",
        "|---|---|---|",
        *(f"| `{e.key}` | {e.kind} | {e.meaning} |" for e in ENTRIES),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
