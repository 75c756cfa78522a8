"""Colours of the HTML report, light and dark: one table that style sheet and charts are both made from.

Every scale runs in lightness as well as in hue, so that it reads with every kind of colour vision and in grey; words and
positions say the same again. What is well stays close to the page; what is not stands out.
"""

from __future__ import annotations

from typing import Any

from update_watch.dashboards.report.charts.classes import CLASSES
from update_watch.report import SEVERITY, Health

THEMES: dict[str, dict[str, str]] = {
    "light": {
        "page": "#ffffff",
        "panel": "#f7f8fa",
        "line": "#e3e6ea",
        "grid": "#eceef1",
        "text": "#1b1f24",
        "quiet": "#5c6570",
        "faint": "#68717c",
        "accent": "#2f6f9f",
        "accent-soft": "#dfeaf3",
        "broken": "#6a1b8a",
        "stalled": "#b3261e",
        "stalling": "#e08a1e",
        "unknown": "#7d8590",
        "unknown-strong": "#5c6570",
        "stalling-strong": "#a85a00",
        "idle": "#b2a48c",
        "frozen": "#a9c8dd",
        "healthy": "#6da4cb",
        "class-0": "#54107a",
        "class-1": "#a31515",
        "class-2": "#e2631a",
        "class-3": "#f6b75c",
        "class-4": "#c9dbe8",
        "class-5": "#d9d3c8",
        "class-6": "#e4e6e9",
        "class-7": "#c4cad1",
        "band": "#f3d9b1",
        "epsilon": "#8b949e",
        "lost": "#b3261e",
        "arrives": "#4c8db8",
        "arrives-low": "#edf3f8",
        "lost-low": "#faeceb",
    },
    "dark": {
        "page": "#101418",
        "panel": "#171c22",
        "line": "#2a313a",
        "grid": "#222931",
        "text": "#e6e9ed",
        "quiet": "#a3adb8",
        "faint": "#909aa6",
        "accent": "#79b8e6",
        "accent-soft": "#1c2f40",
        "broken": "#d69bf2",
        "stalled": "#ff6f5e",
        "stalling": "#e9a23b",
        "unknown": "#8d96a1",
        "unknown-strong": "#a3adb8",
        "stalling-strong": "#e9a23b",
        "idle": "#8f8269",
        "frozen": "#47687f",
        "healthy": "#4a86b0",
        "class-0": "#e3b0ff",
        "class-1": "#ff6a57",
        "class-2": "#d9741f",
        "class-3": "#8f5f1c",
        "class-4": "#26435a",
        "class-5": "#4a4335",
        "class-6": "#2a313a",
        "class-7": "#3f4854",
        "band": "#4a3a1e",
        "epsilon": "#737d88",
        "lost": "#ff6f5e",
        "arrives": "#5d9fcb",
        "arrives-low": "#18232d",
        "lost-low": "#2c1a1b",
    },
}

# Runs side by side; no red and no orange, which mean stalls here. Dashes tell the lines apart as well.
RUNS = {
    "light": (
        *("#2f6f9f", "#9467a8", "#3f9c82", "#7d6a4f", "#66707c"),
        *("#c2588b", "#8a9a2b", "#1f3d6b", "#2aa5c4", "#b08f2e"),
    ),
    "dark": (
        *("#79b8e6", "#c9a0dc", "#6fcfb0", "#c5ad86", "#a3adb8"),
        *("#f09ac0", "#c3d35a", "#9fb4ff", "#6fd6ee", "#e0c15e"),
    ),
}

SANS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
MONO = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"


def health_color(theme: str, health: Health) -> str:
    return THEMES[theme][health.value]


def chart_config(theme: str) -> dict[str, Any]:
    """Vega-Lite configuration of a theme. Chart specifications name styles and ranges; only this has colours."""
    c = THEMES[theme]
    axis = {
        "labelColor": c["quiet"],
        "titleColor": c["quiet"],
        "labelFont": SANS,
        "titleFont": SANS,
        "labelFontSize": 11,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
        "titlePadding": 8,
        "gridColor": c["grid"],
        "domainColor": c["line"],
        "tickColor": c["line"],
        "tickSize": 4,
        "labelPadding": 5,
    }
    return {
        "background": "transparent",
        "font": SANS,
        "view": {"stroke": None},
        "mark": {"aria": False},  # a chart has one description, its own
        "axis": axis,
        "legend": {
            "labelColor": c["quiet"],
            "titleColor": c["quiet"],
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
            "symbolType": "square",
            "symbolStrokeWidth": 0,
            "symbolSize": 90,
            "columnPadding": 16,
        },
        "range": {
            "category": [health_color(theme, health) for health in SEVERITY],
            "ordinal": [c[f"class-{i}"] for i in range(len(CLASSES))],
            "diverging": list(RUNS[theme]),
        },
        "style": {
            "band": {"color": c["band"], "opacity": 0.75},
            "cursor": {"color": c["text"], "opacity": 0.45},
            "rate": {"color": c["faint"], "strokeWidth": 1.5},
            "onset": {"color": c["faint"], "strokeDash": [3, 3]},
            "cell": {"strokeWidth": 0},
            "cell-mark": {"color": c["quiet"], "fontSize": 10, "font": SANS},
            "epsilon": {"color": c["epsilon"], "strokeDash": [4, 3]},
            "edge": {"color": c["text"]},
            "note": {"color": c["quiet"], "fontSize": 10.5, "font": SANS},
            "halo": {"color": c["page"], "stroke": c["page"], "strokeWidth": 4, "fontSize": 10.5, "font": SANS},
            "main": {"color": c["accent"], "strokeWidth": 2},
            "second": {"color": c["stalled"], "strokeWidth": 2},
            "spread": {"color": c["accent"], "opacity": 0.16},
            "lost": {"color": c["lost"]},
            "arrives": {"color": c["arrives"]},
            "lost-word": {"color": c["lost"], "fontSize": 11, "font": SANS},
            "arrives-word": {"color": c["arrives"], "fontSize": 11, "font": SANS},
        },
    }
