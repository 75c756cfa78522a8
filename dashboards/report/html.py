"""The HTML report: one file that needs no network and no server.

Vega, Vega-Lite and vega-embed are inlined from the bundle that vl-convert carries. Everything that comes from a run is
escaped by the template or is JSON data that the page's script puts on the page as text. On top of that the page has a
content security policy: only its own two scripts run, by their hash, and nothing is ever fetched.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import importlib.resources
import json
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from update_watch.dashboards.journal.reader import EmptyJournalError
from update_watch.dashboards.outputs import check_output, replace_text
from update_watch.dashboards.report.charts.classes import CLASSES
from update_watch.dashboards.report.comparison import compare
from update_watch.dashboards.report.details import details
from update_watch.dashboards.report.drawing import every_chart
from update_watch.dashboards.report.first_screen import first_screen
from update_watch.dashboards.report.history import History, read_history
from update_watch.dashboards.report.palette import RUNS, THEMES, chart_config
from update_watch.dashboards.report.picture import write_picture
from update_watch.dashboards.report.tensor_list import tensor_list
from update_watch.dashboards.report.vega import vega

_POLL_SECONDS = 2.0
_RELOAD_SECONDS = 10.0
_SCRIPTS = ("page.js", "charts.js", "map.js", "table.js", "start.js")
# marks, embeddings, overrides and isolates of direction, of Unicode's bidirectional algorithm (UAX 9)
_TURNS = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_STRAIGHT = dict.fromkeys(map(ord, _TURNS), "\ufffd")
_NUMBER = re.compile(r"\d[\d.]*e-\d+")
_ESCAPED_TURN = re.compile(rf"(?<!\\)((?:\\\\)*)\\u(?:{'|'.join(f'{ord(c):04x}' for c in _TURNS)})")  # in JSON
_INSTALL = "The HTML report needs {}: pip install 'update-watch[report]'"


def render_html(histories: Sequence[History], reload_seconds: float | None = None) -> str:
    """The report on one run, or on several side by side.

    Args:
        histories: from `read_history` or `history_of`.
        reload_seconds: the page loads itself anew after so long (s), for a report of a run that goes on.

    Raises:
        ValueError: there is no run.
        ImportError: vl-convert-python or jinja2 is missing.
    """
    if not histories:
        raise ValueError("render_html(histories=[]): at least one run is needed.")
    try:
        import jinja2
    except ImportError as error:
        raise ImportError(_INSTALL.format("jinja2")) from error
    try:
        library = vega()
    except ImportError as error:
        raise ImportError(_INSTALL.format("vl-convert-python")) from error
    # a scope of its own: the bundle's thousands of short names are global
    script = '(() => {\n"use strict";\n' + "\n".join(_resource(name) for name in _SCRIPTS) + "})();\n"
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_kept_straight
    )
    environment.filters["whole"] = _whole_numbers
    screens = [first_screen(history) for history in histories]
    drawn = every_chart(histories, screens)
    data = {
        "themes": {theme: chart_config(theme) for theme in THEMES},
        "classes": CLASSES,
        "charts": drawn.charts,
        "maps": drawn.maps,
        "tensorCharts": drawn.tensor_charts,
        "tensors": tensor_list(histories),
        "cures": [screen.cure.codes if screen.cure else {} for screen in screens],
        "runs": [history.name for history in histories],
        "runColors": len(RUNS["light"]),
        "reload": reload_seconds,
    }
    safe = jinja2.utils.markupsafe.Markup  # only for what is ours or was made safe by `_script_json`
    page: str = environment.from_string(_resource("page.html")).render(
        runs=screens,
        details=[details(history) for history in histories],
        compared=compare(histories, screens) if len(histories) > 1 else (),
        charts=drawn.charts,
        has_heatmaps=any(name.startswith("heatmap-") for name in drawn.charts),
        data=safe(_script_json(data)),
        library=safe(library),
        script=safe(script),
        style=safe(_style()),
        policy=_policy(library, script),
        classes=CLASSES,
        run_colors=len(RUNS["light"]),
        is_shallow=all(
            "width" in spec and spec["width"] != "container"
            for name, spec in drawn.charts.items()
            if name.startswith("map-")
        ),
        is_live=reload_seconds is not None,
    )
    return page


def write_report(
    journal_paths: Sequence[Path],
    out: Path,
    live: bool = False,
    png: Path | None = None,
    keep_going: Callable[[], bool] = lambda: True,
    overwrite: bool = False,
) -> None:
    """Render journals to the file `out`, and a picture of it to `png`.

    Args:
        live: render again whenever a journal grows, until interrupted (Ctrl-C); the page loads itself anew.
        png: a picture of the whole page, made by a headless Chromium.
        keep_going: asked between two looks at the journals; `live` ends when it says no.
        overwrite: replace a file at `out` or `png` that is no report or picture of ours; never a journal that is read.

    Raises:
        OutputError: `out` or `png` would replace a journal, one another, or what is no report or picture of ours.
        JournalError, OSError: a journal cannot be read (`live` waits for one that is not there or empty yet).
        RuntimeError: there is no Chromium to make the picture with.
    """
    paths = [Path(path) for path in journal_paths]
    if not paths:
        raise ValueError("write_report(journal_paths=[]): at least one journal is needed.")
    check_output(out, "report", "--output", paths, overwrite)
    if png is not None:
        check_output(png, "picture", "--png", [*paths, out], overwrite)

    def write(reload_seconds: float | None) -> None:
        replace_text(out, render_html(read_runs(paths), reload_seconds))
        if png is not None:
            write_picture(out, png)

    if not live:
        write(None)
        return
    seen: object = None
    with suppress(KeyboardInterrupt):
        while keep_going():
            now = [_state(path) for path in paths]
            if now != seen:
                with suppress(FileNotFoundError, EmptyJournalError):  # the run is about to begin
                    write(_RELOAD_SECONDS)
                seen = now
            time.sleep(_POLL_SECONDS)


def read_runs(paths: Sequence[Path]) -> list[History]:
    """The histories in journals, each with a name of its own."""
    histories = [read_history(path) for path in paths]
    if len({history.name for history in histories}) < len(histories):
        stems = [path.stem for path in paths]
        names = stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]
        histories = [dataclasses.replace(history, name=name) for history, name in zip(histories, names, strict=True)]
    return histories


# --- assembling ------------------------------------------------------------------------------------------


def _resource(name: str) -> str:
    return (
        importlib.resources.files("update_watch.dashboards.report")
        .joinpath("page")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )


def _style() -> str:
    """The style sheet with the colours of both themes before it."""

    def variables(theme: str) -> str:
        runs = {f"run-{i}": color for i, color in enumerate(RUNS[theme])}
        return "".join(f"--{name}:{color};" for name, color in (THEMES[theme] | runs).items())

    # the system's choice, unless the reader made one
    dark = (
        f"@media (prefers-color-scheme: dark){{:root:not([data-theme=light]){{{variables('dark')}}}}}\n"
        f":root[data-theme=dark]{{{variables('dark')}}}"
    )
    # paper is white, whatever the screen is
    dark += f"\n@media print{{:root:root:root{{color-scheme:light;{variables('light')}}}}}"
    runs = "".join(f".s{i}{{background:var(--run-{i})}}" for i in range(len(RUNS["light"])))
    return f":root{{{variables('light')}}}{runs}\n{dark}\n{_resource('page.css')}"


def _policy(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(data: Any) -> str:
    """JSON that is safe inside a script element: no character that could end it or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    text = _ESCAPED_TURN.sub(r"\1\\ufffd", text)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _kept_straight(value: Any) -> Any:
    """What a page shows of a text: nothing that turns the writing direction, by which a name could read as another."""
    return value.translate(_STRAIGHT) if type(value) is str else value


def _whole_numbers(text: str) -> Any:
    """A text in which no line breaks within a number such as 2.1e-4; safe HTML."""
    import jinja2

    escaped = str(jinja2.utils.markupsafe.escape(_kept_straight(text)))
    return jinja2.utils.markupsafe.Markup(_NUMBER.sub(r'<span class="whole">\g<0></span>', escaped))


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
