"""The HTML report: what it says, that it is one offline file, and how it behaves in a real browser."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import itertools
import json
import re
import shutil
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.run_samples import CURE, Spec, gpt, large, synthetic_run
from update_watch.dashboards.frame import frame_of
from update_watch.dashboards.journal.journal import Journal, JournalError
from update_watch.dashboards.journal.lines import encode, header_line, table_line, window_line
from update_watch.dashboards.report.history import history_of, read_history
from update_watch.dashboards.report.html import read_runs, render_html, write_report
from update_watch.dashboards.report.picture import BROWSERS, find_browser
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

HOSTILE = "</script><img src=x onerror=\"document.title='executed'\"><script>document.title='executed'</script>"
MIXED = tuple(
    dataclasses.replace(spec, kind={0: "frozen", 3: "idle", 4: "unknown", 5: "broken"}.get(i, "bf16"))
    for i, spec in enumerate(gpt(2))
)


def write_journal(path: Path, reports: Iterator[Report] | list[Report], **run: Any) -> Path:
    sink = Journal(path, run=run)
    for report in reports:
        sink(report)
    sink.close()
    return path


def page_data(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found
    data: dict[str, Any] = json.loads(found[1])
    return data


def visible(text: str) -> str:
    """The words of the page, without scripts and style."""
    text = re.sub(r"<(script|style)\b.*?</\1>", " ", text, flags=re.S)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


@pytest.fixture(scope="module")
def mixed() -> str:
    return render_html([history_of(list(synthetic_run(MIXED, windows=20)), "gpt-mixed")])


# --- what it says ----------------------------------------------------------------------------------------


def test_the_headline_and_the_cure_are_on_the_page(mixed):
    report = list(synthetic_run(MIXED, windows=20))[-1]
    words = visible(mixed).replace(" :", ":")
    assert report.headline in words
    assert CURE in words


def test_the_summary_counts_every_health(mixed):
    report = list(synthetic_run(MIXED, windows=20))[-1]
    for health, count in report.counts.items():
        if count:
            assert f"{count} {health}" in visible(mixed)


def test_all_tensors_are_in_the_table_worst_first(mixed):
    report = list(synthetic_run(MIXED, windows=20))[-1]
    tensors = page_data(mixed)["tensors"]
    rows = [dict(zip(tensors["fields"], row, strict=True)) for row in tensors["rows"]]
    assert {row["name"] for row in rows} == {t.name for t in report.tensors}
    assert [row["health"] for row in rows] == sorted(row["health"] for row in rows)
    by_name = {t.name: t for t in report.tensors}
    for row in rows:
        t = by_name[row["name"]]
        assert tensors["healths"][row["health"]] == t.health.value
        assert tensors["texts"][row["advice"]] == t.advice
        assert _close(row["efficiency"], t.efficiency)
        assert _close(row["critical"], t.critical_lr / t.lr if t.critical_lr else None)
        assert {a[0] for a in row["accumulators"]} == set(t.accumulators)


def _close(shown: float | None, value: float | None) -> bool:
    return shown is value or (shown is not None and value is not None and abs(shown - value) <= 6e-3 * abs(value))


def test_a_healthy_run_says_that_nothing_stalls_and_nobody_was_alerted():
    words = visible(render_html([history_of(list(synthetic_run(gpt(1), windows=3, precision="fp32")))]))
    assert "Nothing stalls: every update that was wanted arrives." in words
    assert "No alert: nothing changed that anybody had to hear of." in words
    assert "stored in float32: the band shows where they would stand in BF16" in words


def test_a_run_of_which_nothing_is_known_says_so():
    report = Report(
        10, 10, Health.unknown, "Unknown.", (TensorReport("a", Health.unknown, advice="Unknown, because."),)
    )
    words = visible(render_html([history_of([report])]))
    assert "No update was measured in the last window." in words
    assert "No headroom was measured in the last window." in words
    assert "Nothing was measured beside the weights." in words


def test_a_thinned_or_damaged_journal_is_named_as_such(tmp_path):
    path = write_journal(tmp_path / "j.jsonl", list(synthetic_run(gpt(1), windows=3)))
    path.write_bytes(path.read_bytes() + b"{broken\n")
    words = visible(render_html([read_history(path)]))
    assert "1 damaged line of the journal could not be read" in words
    reports = [Report(10 * n, 10, Health.healthy, "", (TensorReport("a", Health.healthy),)) for n in range(1, 2001)]
    words = visible(render_html([history_of(reports)]))
    assert "2,000 windows. A column of a chart stands for about 10, and shows each tensor's worst one." in words


def test_many_alerts_are_listed_newest_first_and_the_others_are_counted():
    tensor = TensorReport("a", Health.healthy)
    reports = [
        Report(10 * n, 10, Health.healthy, "", (tensor,), alerts=(Alert(10 * n, Level.warn, f"alert {n}", "text"),))
        for n in range(1, 101)
    ]
    words = visible(render_html([history_of(reports)]))
    assert words.index("alert 100") < words.index("alert 99") < words.index("alert 61")
    assert "alert 60" not in words
    assert "60 more alerts are in the journal and in the timeline." in words


def test_runs_side_by_side_have_their_names_verdicts_and_rows():
    runs = [history_of(list(synthetic_run(gpt(1), windows=4, precision=p)), p) for p in ("bf16", "fp32")]
    text = render_html(runs)
    data = page_data(text)
    assert data["runs"] == ["bf16", "fp32"]
    assert "2 runs side by side" in visible(text)
    heatmaps = [data["charts"][f"heatmap-{i}-tensor"] for i in (0, 1)]
    assert heatmaps[0]["params"][0]["value"] == heatmaps[1]["params"][0]["value"]  # the same rows in the same order
    run = data["tensors"]["fields"].index("run")
    assert {row[run] for row in data["tensors"]["rows"]} == {0, 1}


def test_runs_of_one_name_are_told_apart_by_their_files(tmp_path):
    for folder in ("a", "b"):
        write_journal(tmp_path / folder / "run.jsonl", list(synthetic_run(gpt(1), windows=1)), name="gpt")
    names = [history.name for history in read_runs([tmp_path / "a" / "run.jsonl", tmp_path / "b" / "run.jsonl"])]
    assert names == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_no_run_is_refused():
    with pytest.raises(ValueError, match=r"render_html\(histories=\[\]\): at least one run"):
        render_html([])
    with pytest.raises(ValueError, match=r"write_report\(journal_paths=\[\]\): at least one journal"):
        write_report([], Path("report.html"))


# --- one file, safe and offline ------------------------------------------------------------------------------


def hostile_run() -> list[Report]:
    tensor = TensorReport(
        f"h.0.{HOSTILE}",
        Health.stalled,
        Cause.weight_rounding,
        HOSTILE,
        names=(HOSTILE, "other"),
        layer=HOSTILE,
        optimizer_group=HOSTILE,
        dtype=HOSTILE,
        efficiency=0.01,
        update_ratio=1e-4,
        applied_ratio=0.0,
        numel=10,
        lr=1e-3,
        critical_lr=1e-2,
        headroom_histogram=(1 / 32,) * 32,
        accumulators={HOSTILE: dataclasses.replace(_accumulator(), name=HOSTILE)},
    )
    other = dataclasses.replace(tensor, name=f"h.1.{HOSTILE}")
    alert = Alert(10, Level.error, HOSTILE, HOSTILE, (HOSTILE,))
    return [Report(10, 10, Health.stalled, HOSTILE, (tensor, other), alerts=(alert,))]


def _accumulator() -> Any:
    from update_watch.report import AccumulatorReport

    return AccumulatorReport("x", HOSTILE, Health.stalled, Cause.state_rounding, HOSTILE, efficiency=0.1)


def test_nothing_from_a_run_becomes_markup():
    text = render_html([history_of(hostile_run(), HOSTILE)])
    tags = re.findall(
        r"<(img|script|iframe|object|link|svg)\b[^>]*>",
        re.sub(r"(<script>)(.*?)(</script>)", r"\1\3", text, flags=re.S),
    )
    assert tags == ["script"] * 3  # data, library, the page's own
    assert text.count("</script>") == 3
    assert visible(text).count(HOSTILE.split('"')[1].split("'")[1]) > 0  # it is there, as text


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(mixed):
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]+)"', mixed)
    policy = html.unescape(policy)
    scripts = re.findall(r"<script>(.*?)</script>", mixed, re.S)
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes)
    assert policy.startswith(f"default-src 'none'; script-src {allowed};")
    assert "unsafe-eval" not in policy
    assert not re.findall(r"<[^>]+\b(?:src|href)=[\"'](?!#)", re.sub(r"<script>.*?</script>", "", mixed, flags=re.S))


def test_the_file_is_written_in_one_step_and_leaves_nothing_beside_it(tmp_path):
    journal = write_journal(tmp_path / "j.jsonl", list(synthetic_run(gpt(1), windows=2)))
    (tmp_path / "out").mkdir()
    write_report([journal], tmp_path / "out" / "r.html")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["r.html"]
    assert (tmp_path / "out" / "r.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_missing_packages_are_named_with_their_install_command(monkeypatch):
    from update_watch.dashboards.report import html as module

    module._vega.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ImportError, match=r"needs vl-convert-python: pip install 'update-watch\[report\]'"):
        render_html([history_of(hostile_run())])


@pytest.mark.parametrize("content", [b"", b"text\n"], ids=["empty", "text"])
def test_a_file_without_windows_is_an_error_with_its_name(tmp_path, content):
    (tmp_path / "j.jsonl").write_bytes(content)
    with pytest.raises(JournalError, match=r"j\.jsonl"):
        write_report([tmp_path / "j.jsonl"], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


# --- live ------------------------------------------------------------------------------------------------


def test_a_live_report_waits_for_the_journal_and_is_written_again_when_it_grows(tmp_path, monkeypatch):
    monkeypatch.setattr("update_watch.dashboards.report.html._POLL_SECONDS", 0.02)
    journal, out = tmp_path / "j.jsonl", tmp_path / "r.html"
    is_going = True
    writer = threading.Thread(target=write_report, args=([journal], out, True, None, lambda: is_going))
    writer.start()
    try:
        sink = Journal(journal)
        for report in synthetic_run(gpt(1), windows=2):
            sink(report)
            assert _until(lambda r=report: out.exists() and f"steps 0 – {r.step:,}" in visible(out.read_text("utf-8")))
        text = out.read_text(encoding="utf-8")
        assert page_data(text)["reload"] == 10
        assert "live" in visible(text)
    finally:
        is_going = False
        writer.join(30)
    assert not writer.is_alive()


def test_a_live_report_of_a_file_that_is_no_journal_fails_at_once(tmp_path):
    (tmp_path / "j.jsonl").write_text("no journal\n")
    with pytest.raises(JournalError, match="not an update-watch journal"):
        write_report([tmp_path / "j.jsonl"], tmp_path / "r.html", live=True)


def _until(is_true: Callable[[], bool], seconds: float = 30.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if is_true():
            return True
        time.sleep(0.05)
    return False


# --- in the browser ----------------------------------------------------------------------------------------

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1240,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    selenium = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("Debian's chromium and chromedriver are not installed: apt-get install chromium chromium-driver")
    options = selenium.ChromeOptions()
    options.binary_location = chromium
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    from selenium.webdriver.chrome.service import Service

    opened = selenium.Chrome(options=options, service=Service(driver))
    yield opened
    opened.quit()


class Page:
    """A report opened in the browser, with everything drawn."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light") -> None:
        self.browser = browser
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.get("about:blank")
        browser.get_log("browser")
        browser.execute_cdp_cmd("Network.enable", {})
        browser.get(path.as_uri())
        assert self.is_drawn()
        self.console = browser.get_log("browser")

    def is_drawn(self) -> bool:
        return _until(lambda: self.js("return document.documentElement.dataset.height") is not None)

    def js(self, script: str, *arguments: Any) -> Any:
        return self.browser.execute_script(script, *arguments)

    def names(self) -> list[str]:
        return list(self.js("return [...document.querySelectorAll('#table .row .name')].map(e => e.textContent)"))

    def column(self, title: str) -> list[str]:
        place = self.js(
            "return [...document.querySelectorAll('#table th')].findIndex(e => e.innerText === arguments[0])", title
        )
        return list(
            self.js(
                "return [...document.querySelectorAll('#table .row')].map(e => e.cells[arguments[0]].innerText)", place
            )
        )

    def sort(self, title: str) -> None:
        self.js(
            "[...document.querySelectorAll('#table th button')].find(e => e.textContent === arguments[0]).click()",
            title,
        )

    def search(self, words: str) -> None:
        self.js(
            "const s = document.getElementById('search'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))",
            words,
        )


def to_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "report.html"
    path.write_text(text, encoding="utf-8")
    return path


def empty_charts(page: Page) -> list[str]:
    """Charts without marks: an SVG without shapes, or a canvas of one colour."""
    script = """
        return [...document.querySelectorAll("[data-chart]")].filter((e) => {
          const svg = e.querySelector("svg"), canvas = e.querySelector("canvas");
          if (svg) return svg.querySelectorAll("[class*=mark] path, [class*=mark] line").length < 3;
          if (!canvas) return true;
          const pixels = new Uint32Array(canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.buffer);
          return new Set(pixels).size < 4;
        }).map((e) => e.dataset.chart);
    """
    return list(page.js(script))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_chart_is_drawn_without_a_word_on_the_console(browser, tmp_path, mixed, scheme):
    page = Page(browser, to_file(tmp_path, mixed), scheme)
    assert page.console == []
    assert page.js("return document.querySelectorAll('[data-chart]').length") == 9
    assert empty_charts(page) == []


def test_the_page_follows_the_systems_dark_mode_while_it_is_open(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed), "light")
    look = "return [getComputedStyle(document.body).backgroundColor, document.querySelector('[data-chart=efficiency] svg').outerHTML]"
    background, chart = page.js(look)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert _until(lambda: page.js(look)[1] != chart)
    assert page.is_drawn()
    assert background == "rgb(255, 255, 255)"
    assert page.js(look)[0] == "rgb(16, 20, 24)"
    assert "#79b8e6" in page.js(look)[1]  # the line in the dark theme's colour
    assert browser.get_log("browser") == []


def test_the_table_sorts_by_any_column_and_back(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    unsorted = page.names()
    page.sort("Efficiency")
    values = [float(v) for v in page.column("Efficiency") if v != "–"]
    assert values == sorted(values)
    assert len(set(values)) > 3
    assert page.column("Efficiency")[-1] == "–"  # what is not known comes last
    page.sort("Efficiency")
    values = [float(v) for v in page.column("Efficiency") if v != "–"]
    assert values == sorted(values, reverse=True)
    assert page.column("Efficiency")[-1] == "–"
    assert page.js("return document.querySelector('#table th[aria-sort]').getAttribute('aria-sort')") == "descending"
    page.sort("Efficiency")
    assert page.names() == unsorted
    page.sort("Elements")
    elements = [int(v.replace(",", "")) for v in page.column("Elements")]
    assert elements == sorted(elements, reverse=True)
    page.sort("Tensor")
    assert page.names()[:2] == ["transformer.h.0.attn.c_attn.bias", "transformer.h.0.attn.c_attn.weight"]


def test_the_table_finds_by_words_of_name_cause_and_advice_and_by_health(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    total = len(page.names())
    page.search("LN_1  h.1. weight_rounding")
    assert sorted(page.names()) == ["transformer.h.1.ln_1.bias", "transformer.h.1.ln_1.weight"]
    page.search("detaches it from the loss")
    assert page.names() == ["transformer.h.0.ln_1.bias"]
    page.search("no such tensor")
    assert page.names() == []
    assert "No tensor matches." in page.js("return document.getElementById('more').innerText")
    page.search("")
    assert len(page.names()) == total
    page.js("[...document.querySelectorAll('#chips button')].find(e => e.innerText.startsWith('broken')).click()")
    assert set(page.column("Health")) == {"broken"}
    assert page.js("return document.getElementById('found').innerText") == f"1 of {total} tensors"


def test_a_click_on_a_tensor_shows_its_advice_and_its_accumulators(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    page.search("h.1.ln_2.weight")
    page.js("document.querySelector('#table .row .name button').click()")
    detail = page.js("return document.querySelector('#table .detail').innerText")
    assert CURE in detail
    assert "exp_avg_sq" in detail
    assert "rounds its decay away" in detail
    assert page.js("return document.querySelector('#table .name button').getAttribute('aria-expanded')") == "true"
    page.js("document.querySelector('#table .row').click()")
    assert page.js("return document.querySelector('#table .detail')") is None


def test_the_heatmaps_rows_can_be_changed(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    height = "return document.querySelector('[data-chart=heatmap-0] canvas').getBoundingClientRect().height"
    by_tensor = page.js(height)
    page.js("document.querySelector('[data-view=kind]').click()")
    assert page.is_drawn()
    assert page.js(height) < by_tensor
    assert empty_charts(page) == []
    page.js("document.querySelector('[data-view=tensor]').click()")  # the choice is remembered: put it back
    assert page.is_drawn()


def test_search_and_order_outlive_a_reload(browser, tmp_path, mixed):
    path = to_file(tmp_path, mixed)
    page = Page(browser, path)
    page.search("ln_1")
    page.sort("Elements")
    names = page.names()
    page = Page(browser, path)
    assert page.names() == names
    assert page.js("return document.getElementById('search').value") == "ln_1"


def test_a_live_page_loads_itself_anew(browser, tmp_path):
    history = history_of(list(synthetic_run(gpt(1), windows=2)), "first")
    path = to_file(tmp_path, render_html([history], reload_seconds=1.5))
    page = Page(browser, path)
    to_file(tmp_path, render_html([dataclasses.replace(history, name="second")]))
    assert _until(lambda: "second" in browser.title)
    assert page.is_drawn()


def test_hostile_names_are_shown_as_text_and_never_run(browser, tmp_path):
    page = Page(
        browser, to_file(tmp_path, render_html([history_of(hostile_run(), HOSTILE), history_of(hostile_run(), "b")]))
    )
    page.js("document.querySelectorAll('#table .row').forEach(e => e.click())")
    page.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    from selenium.webdriver import ActionChains

    find = "const e = document.querySelector('[data-chart=heatmap-0] canvas'); e.scrollIntoView({block: 'center'}); return e"
    tooltip = "return document.getElementById('vg-tooltip-element')?.innerText || ''"
    offsets = itertools.cycle((-20, -10, 0, 10, 20, 30))

    def is_shown() -> bool:  # the chart may still be drawn or move: the pointer goes over its rows until one answers
        ActionChains(browser).move_to_element_with_offset(page.js(find), 100, next(offsets)).perform()
        time.sleep(0.2)
        return "onerror" in page.js(tooltip)

    assert _until(is_shown), page.js(tooltip)
    assert page.js("return document.title").startswith("</script><img src=x onerror")
    assert page.js("return document.querySelectorAll('img, iframe').length") == 0
    assert page.js("return document.querySelectorAll('script').length") == 3
    assert HOSTILE in page.js("return document.querySelector('#table').innerText")
    assert browser.get_log("browser") == []


def test_the_policy_stops_what_would_get_through(browser, tmp_path, mixed):
    text = mixed.replace(
        "<footer>",
        "<img src=x onerror=\"document.title='executed'\"><script>document.title='executed'</script><footer>",
    )
    page = Page(browser, to_file(tmp_path, text))
    assert page.js("return document.title") != "executed"
    assert any("Content Security Policy" in entry["message"] for entry in page.console)


def test_runs_side_by_side_are_drawn_next_to_each_other(browser, tmp_path):
    runs = [history_of(list(synthetic_run(gpt(2), windows=8, precision=p)), p) for p in ("bf16", "fp32")]
    page = Page(browser, to_file(tmp_path, render_html(runs)))
    assert page.console == []
    assert empty_charts(page) == []
    boxes = [
        page.js(
            f"const b = document.querySelector('[data-chart=heatmap-{i}]').getBoundingClientRect(); return [b.x, b.y]"
        )
        for i in (0, 1)
    ]
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] < boxes[1][0]
    assert set(page.column("Run")) == {"bf16", "fp32"}


@pytest.mark.parametrize("width", [390, 1240])
def test_nothing_makes_the_page_wider_than_the_window(browser, tmp_path, mixed, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, to_file(tmp_path, mixed))
        assert page.js("return document.documentElement.scrollWidth") <= width
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


# --- scale --------------------------------------------------------------------------------------------------


def thinned_journal(path: Path, specs: tuple[Spec, ...], lines: int, windows_per_line: int) -> Path:
    """What a journal of `lines * windows_per_line` windows looks like once it is thinned; one tensor stalls once."""
    with path.open("wb") as file:
        file.write(encode(header_line({"name": "large"}, 0.0)))
        for k, report in enumerate(synthetic_run(specs, windows=lines, window=128 * windows_per_line, peak=3e-2)):
            if k == lines // 2:
                stalled = dataclasses.replace(
                    report.tensors[1234], health=Health.stalled, cause=Cause.weight_rounding, efficiency=0.01
                )
                report = dataclasses.replace(
                    report, tensors=(*report.tensors[:1234], stalled, *report.tensors[1235:]), health=Health.stalled
                )
            frame = dataclasses.replace(frame_of(report), windows=windows_per_line)
            table = table_line(frame.table)
            file.write((encode(table) if k == 0 else b"") + encode(window_line(frame, table["table"])))
    return path


@pytest.mark.slow
def test_two_thousand_tensors_and_ten_thousand_windows_open_in_two_seconds(browser, tmp_path):
    history = read_history(thinned_journal(tmp_path / "j.jsonl", large(2000), lines=100, windows_per_line=100))
    assert (len(history.table.name), history.windows) == (2000, 10_000)
    text = render_html([history])
    assert len(text.encode()) < 10e6
    for view in ("kind", "layer", "worst"):
        cells = page_data(text)["charts"][f"heatmap-0-{view}"]["data"]["values"]
        assert any(c["verdict"] == "stalled" and c["begin"] < 646_400 <= c["end"] for c in cells), view
    # Time of the page's main thread on the processor: what other programs do meanwhile does not count.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = Page(browser, to_file(tmp_path, text))
    metrics = {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    browser.execute_cdp_cmd("Performance.disable", {})
    assert page.console == []
    assert empty_charts(page) == []
    assert metrics["TaskDuration"] < 2.0, metrics
    started = time.process_time()
    assert page.js("return document.querySelectorAll('#table .row').length") == 100
    page.js("[...document.querySelectorAll('#more button')].at(-1).click()")
    assert len(page.names()) == 2000
    assert time.process_time() - started < 2.0


# --- pictures -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_picture_shows_the_whole_page(tmp_path):
    try:
        find_browser()
    except RuntimeError as error:
        pytest.skip(str(error))
    journal = write_journal(tmp_path / "j.jsonl", list(synthetic_run(gpt(1), windows=3)))
    write_report([journal], tmp_path / "r.html", png=tmp_path / "pictures" / "r.png")
    data = (tmp_path / "pictures" / "r.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width == 2 * 1240
    assert height > 2 * 3000


def test_without_a_browser_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"needs Chromium or Chrome, and none of .* Install one") as caught:
        find_browser()
    assert all(name in str(caught.value) for name in BROWSERS)


def test_a_browser_that_fails_is_an_error_with_its_last_words(tmp_path, monkeypatch):
    fake = tmp_path / "chromium"
    fake.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    journal = write_journal(tmp_path / "j.jsonl", list(synthetic_run(gpt(1), windows=1)))
    with pytest.raises(RuntimeError, match="chromium ended with code 3: no display"):
        write_report([journal], tmp_path / "r.html", png=tmp_path / "r.png")
    assert (tmp_path / "r.html").exists()  # the report itself is there
