"""The HTML report: one file that needs no network and no server.

Vega, Vega-Lite and vega-embed are inlined from the bundle that vl-convert carries. Everything that comes from a run is
escaped by the template or is JSON data that the page's script puts on the page as text. On top of that the page has a
content security policy: only its own two scripts run, by their hash, and nothing is ever fetched.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import hashlib
import importlib.resources
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from update_watch.dashboards.journal.journal import EmptyJournalError
from update_watch.dashboards.outputs import check_output
from update_watch.dashboards.report import charts
from update_watch.dashboards.report.chart_parts import scales_of
from update_watch.dashboards.report.headroom_charts import headroom, headroom_by_row
from update_watch.dashboards.report.heatmap_chart import heatmap
from update_watch.dashboards.report.history import History, read_history
from update_watch.dashboards.report.page import run_page
from update_watch.dashboards.report.palette import CLASSES, THEMES, chart_config
from update_watch.dashboards.report.picture import write_picture
from update_watch.dashboards.report.ratio_charts import ratios_by_layer, ratios_over_steps
from update_watch.dashboards.report.row_groups import Rows, kind_rows, layer_rows, tensor_rows
from update_watch.dashboards.report.tensor_list import tensor_list
from update_watch.report import SEVERITY

ROWS = 80  # of a heatmap; a model with more tensors is shown by layers, by kinds, and by its worst tensors
_RATIO_ROWS = 60
_WORST = 60
_POLL_SECONDS = 2.0
_RELOAD_SECONDS = 10.0
_BUNDLE = "window.vegaEmbed = vegaEmbed;"
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
    library, script = _vega(), _resource("report.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found = _charts(histories)
    data = {
        "themes": {theme: chart_config(theme) for theme in THEMES},
        "charts": found,
        "tensors": tensor_list(histories),
        "runs": [history.name for history in histories],
        "reload": reload_seconds,
    }
    safe = jinja2.utils.markupsafe.Markup  # only for what is ours or was made safe by `_script_json`
    page: str = environment.from_string(_resource("report.html")).render(
        runs=[run_page(history) for history in histories],
        data=safe(_script_json(data)),
        library=safe(library),
        script=safe(script),
        style=safe(_style()),
        policy=_policy(library, script),
        classes=CLASSES,
        healths=[health.value for health in SEVERITY],
        is_live=reload_seconds is not None,
        views=[(key, label) for key, label in _VIEWS.items() if f"heatmap-0-{key}" in found],
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


def replace_text(path: Path, text: str) -> None:
    """Write a file in one step: whoever opens it sees the old one or the new one, whole."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with open(handle, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise


# --- charts ----------------------------------------------------------------------------------------------

_VIEWS = {"tensor": "by tensor", "kind": "by kind", "layer": "by layer", "worst": "worst tensors"}


def _charts(histories: Sequence[History]) -> dict[str, Any]:
    """Specifications by "<chart>-<run>", for heatmaps "heatmap-<run>-<view>"."""
    scales = scales_of(histories)
    names = list(dict.fromkeys(name for history in histories for name in history.table.name))
    layers = {
        n: layer for history in histories for n, layer in zip(history.table.name, history.table.layer, strict=True)
    }
    views = _heatmap_rows(histories, names, layers)
    by_layer = layer_rows(names, [layers[name] for name in names], _RATIO_ROWS)
    by_kind = kind_rows(names, _RATIO_ROWS)
    found: dict[str, Any] = {"efficiency": charts.efficiency_over_steps(histories, scales)}
    for run, history in enumerate(histories):
        place = {name: i for i, name in enumerate(history.table.name)}
        for key, rows in views.items():
            found[f"heatmap-{run}-{key}"] = heatmap(history, _of_run(rows, names, place), scales)
        found[f"health-{run}"] = charts.health_over_steps(history, scales)
        found[f"ratios-{run}"] = ratios_over_steps(history, scales)
        found[f"layers-{run}"] = ratios_by_layer(history, _of_run(by_layer, names, place), scales)
        found[f"headroom-{run}"] = headroom(history, scales)
        found[f"kinds-{run}"] = headroom_by_row(history, _of_run(by_kind, names, place), scales)
        found[f"accumulators-{run}"] = charts.accumulators(history)
        found[f"alerts-{run}"] = charts.alert_timeline(history, scales)
    return found


def _heatmap_rows(histories: Sequence[History], names: Sequence[str], layers: Mapping[str, str]) -> dict[str, Rows]:
    kinds = kind_rows(names, ROWS)
    views = {"tensor": tensor_rows(names)} if len(names) <= ROWS else {}
    if len(kinds.labels) < 0.7 * len(names):
        views["kind"] = kinds
    if len(names) > ROWS:
        views["layer"] = layer_rows(names, [layers[name] for name in names], ROWS)
        views["worst"] = tensor_rows(names, _worst(histories, names))
    return views


def _worst(histories: Sequence[History], names: Sequence[str]) -> list[int]:
    """The tensors that were worst in any run: by health, then by how long, then by efficiency."""
    place = {name: i for i, name in enumerate(names)}
    order: dict[int, tuple[float, ...]] = {}
    for history in histories:
        health = history.health_PH
        worst_P = health.min(axis=1)
        long_P = (health == worst_P[:, None]).sum(axis=1)
        low_P = np.nan_to_num(history.series_PH["efficiency"], nan=9.0).min(axis=1)
        for name, *key in zip(history.table.name, worst_P.tolist(), (-long_P).tolist(), low_P.tolist(), strict=True):
            i = place[name]
            order[i] = min(order.get(i, tuple(key)), tuple(key))
    return sorted(order, key=order.__getitem__)[:_WORST]


def _of_run(rows: Rows, names: Sequence[str], place: Mapping[str, int]) -> Rows:
    """The same rows with the indices that a run's own tensors have."""
    members = tuple(tuple(place[names[i]] for i in row if names[i] in place) for row in rows.members)
    return rows._replace(members=members)


# --- assembling ------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1)  # seconds of work, always the same
def _vega() -> str:
    try:
        import vl_convert
    except ImportError as error:
        raise ImportError(_INSTALL.format("vl-convert-python")) from error
    bundle: str = vl_convert.javascript_bundle(_BUNDLE)
    # a closing tag inside a string would end the script element; Vega's bundle has none today
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _resource(name: str) -> str:
    return importlib.resources.files("update_watch.dashboards.report").joinpath(name).read_text(encoding="utf-8")


def _style() -> str:
    """The style sheet with the colours of both themes before it."""

    def variables(theme: str) -> str:
        return "".join(f"--{name}:{color};" for name, color in THEMES[theme].items())

    dark = f"@media (prefers-color-scheme: dark){{:root{{{variables('dark')}}}}}"
    return f":root{{{variables('light')}}}\n{dark}\n{_resource('report.css')}"


def _policy(*scripts: str) -> str:
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def _script_json(data: Any) -> str:
    """JSON that is safe inside a script element: no character that could end it or begin a comment."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False, ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns
