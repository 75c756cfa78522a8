"""The HTML report in a real browser: every chart is drawn, everything can be used, nothing hostile runs."""

from __future__ import annotations

import dataclasses
import itertools
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.browser import opened
from tests.support.report_pages import HOSTILE, MIXED, hostile_run, page_data, until
from tests.support.run_samples import CURE, Spec, gpt, large, synthetic_run
from update_watch.dashboards.frame import frame_of
from update_watch.dashboards.journal.lines import encode, header_line, window_line
from update_watch.dashboards.journal.table import table_line
from update_watch.dashboards.report.history import history_of, read_history
from update_watch.dashboards.report.html import render_html
from update_watch.report import Cause, Health

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

# --- in the browser ----------------------------------------------------------------------------------------

FLAGS = (
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1240,1000",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    driver = opened(tmp_path_factory.mktemp("profile"), *FLAGS)
    yield driver
    driver.quit()


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
        return until(lambda: self.js("return document.documentElement.dataset.height") is not None)

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
    seen_first = page.js(
        "return performance.getEntriesByType('mark').filter(m => m.startTime < document.documentElement.dataset.drawn)"
        ".map(m => m.name.replace('draw ', ''))"
    )
    assert seen_first == ["arrived", "map-0", "heatmap-0"]  # what is folded waits
    assert until(lambda: empty_charts(page) == []), empty_charts(page)  # and is there before anybody prints
    assert page.js(
        "document.querySelectorAll('details').forEach(e => { e.open = true });"
        "return [...document.querySelectorAll('[data-chart]')].map(e => e.dataset.chart)"
    ) == ["arrived", "map-0", "heatmap-0", "ratios-0", "headroom-0", "states-0"]
    assert until(lambda: empty_charts(page) == []), empty_charts(page)
    # to read a canvas as often as this test does is slow, says the browser
    assert [
        entry
        for entry in browser.get_log("browser")
        if "willReadFrequently" not in str(entry) and "Multiple readback" not in str(entry)
    ] == []


def test_facts_of_the_run_are_parted_and_not_their_words(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    script = """
        return [...document.querySelectorAll(arguments[0])].map((e) => getComputedStyle(e, "::before").content);
    """
    assert set(page.js(script, ".where > span")) == {'" · "'}
    assert set(page.js(script, ".where span span")) == {"none"}  # a number that is kept whole


@pytest.mark.parametrize("name", ["arrived", "heatmap-0", "map-0"])
def test_charts_say_what_they_show(browser, tmp_path, mixed, name):
    page = Page(browser, to_file(tmp_path, mixed))
    script = """
        const chart = document.querySelector(`[data-chart=${arguments[0]}]`);
        return [...chart.querySelectorAll("[aria-label]"), chart].map((e) => e.getAttribute("aria-label")).join(" ");
    """
    label = page.js(script, name)
    assert page_data(mixed)["charts"][name]["description"] in label
    assert "Vega visualization" not in label


def test_the_page_follows_the_systems_dark_mode_while_it_is_open(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed), "light")
    look = "return [getComputedStyle(document.body).backgroundColor, document.querySelector('[data-chart=arrived] svg').outerHTML]"
    background, chart = page.js(look)
    features = [{"name": "prefers-color-scheme", "value": "dark"}]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    assert until(lambda: page.js(look)[1] != chart)
    assert page.is_drawn()
    assert background == "rgb(255, 255, 255)"
    assert page.js(look)[0] == "rgb(16, 20, 24)"
    assert "#79b8e6" in page.js(look)[1]  # the line in the dark theme's colour
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print", "features": features})  # paper is white
    assert page.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.js("return getComputedStyle(document.querySelector('[data-chart=arrived]')).filter").startswith(
        "invert"
    )
    head = "return getComputedStyle(document.querySelector('#table th'), '::before').content"
    assert page.js(head) == '"Tensor"'  # buttons are missing in the heads of further pages
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
    assert browser.get_log("browser") == []


def percent(text: str) -> float:
    return 0.4 if text == "<1%" else 99.6 if text == ">99%" else float(text.rstrip("%"))


def test_the_table_sorts_by_any_column_and_back(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    unsorted = page.names()
    page.sort("Arrived")
    values = [percent(v) for v in page.column("Arrived") if v != "–"]
    assert values == sorted(values)
    assert len(set(values)) > 3
    assert page.column("Arrived")[-1] == "–"  # what is not known comes last
    page.sort("Arrived")
    values = [percent(v) for v in page.column("Arrived") if v != "–"]
    assert values == sorted(values, reverse=True)
    assert page.column("Arrived")[-1] == "–"
    assert page.js("return document.querySelector('#table th[aria-sort]').getAttribute('aria-sort')") == "descending"
    page.sort("Arrived")
    assert page.names() == unsorted
    page.sort("Elements")
    elements = [int(v.replace(",", "")) for v in page.column("Elements")]
    assert elements == sorted(elements, reverse=True)
    page.sort("Tensor")
    assert page.names()[:2] == ["h.0.attn.c_attn.bias", "h.0.attn.c_attn.weight"]


def test_the_table_finds_by_words_of_name_cause_and_advice_and_by_health(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    total = len(page.names())
    page.search("LN_1  h.1. weight_rounding")
    assert sorted(page.names()) == ["h.1.ln_1.bias", "h.1.ln_1.weight"]
    page.search("detaches it from the loss")
    assert page.names() == ["h.0.ln_1.bias"]
    page.search("no such tensor")
    assert page.names() == []
    assert "No tensor matches." in page.js("return document.getElementById('moretensors').innerText")
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


def test_a_tensor_is_two_clicks_away_and_has_an_address(browser, tmp_path, mixed):
    path = to_file(tmp_path, mixed)
    page = Page(browser, path)
    from selenium.webdriver import ActionChains

    find = "const e = document.querySelector('[data-chart=map-0] svg'); e.scrollIntoView({block: 'center'}); return e"
    place = """
        const b = document.querySelector('[data-chart=map-0] svg .mark-rect path').getBoundingClientRect();
        const w = arguments[0].getBoundingClientRect();
        return [b.x + b.width / 2 - w.x - w.width / 2, b.y + b.height / 2 - w.y - w.height / 2];
    """

    def is_opened() -> bool:  # the page may still be moving: the cell is clicked until it answers
        whole = page.js(find)
        x, y = page.js(place, whole)
        ActionChains(browser).move_to_element_with_offset(whole, round(x), round(y)).click().perform()
        return page.js("return document.querySelector('#table .detail .full')") is not None

    assert until(is_opened)
    name = page.js("return document.querySelector('#table .detail .full').innerText")
    assert name.startswith("transformer.")
    address = page.js("return location.hash")
    assert address == "#tensor=" + name
    again = Page(browser, Path(str(path)))
    browser.get("about:blank")
    browser.get(path.as_uri() + "#tensor=transformer.h.1.mlp.c_fc.weight")
    assert again.is_drawn()
    assert (
        again.js("return document.querySelector('#table .detail .full').innerText") == "transformer.h.1.mlp.c_fc.weight"
    )
    drawn = "return [...document.querySelectorAll('.tensorcharts [data-series] svg')].length"
    assert until(lambda: again.js(drawn) == 4), again.js(drawn)  # arrived, size, margin, learning rate


def test_a_slider_moves_the_map_over_the_run(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    look = "return document.querySelector('[data-chart=map-0] svg').outerHTML"
    at_end = page.js(look)
    page.js("const s = document.getElementById('moment'); s.value = 0; s.dispatchEvent(new Event('input'))")
    assert until(lambda: page.js(look) != at_end)
    assert page.js("return document.getElementById('at').innerText") == "128"


def test_one_line_follows_the_pointer_through_all_charts_over_time(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    move = """
        const e = document.querySelector("[data-chart=arrived]"), b = e.querySelector("svg").getBoundingClientRect();
        e.dispatchEvent(new MouseEvent("mousemove", { clientX: b.x + b.width / 2, clientY: b.y + 20, bubbles: true }));
    """
    page.js(move)
    step = "return document.querySelector('[data-chart=heatmap-0]').drawn.view.data('cursor').map(row => row.step)"
    assert until(lambda: len(page.js(step)) == 1)
    assert 500 < page.js(step)[0] < 2060


@pytest.mark.parametrize("axis", ["hours", "time"])
def test_the_x_axis_can_be_hours_or_the_clock(browser, tmp_path, mixed, axis):
    page = Page(browser, to_file(tmp_path, mixed))
    page.js(
        "const s = document.getElementById('axis'); s.value = arguments[0]; s.dispatchEvent(new Event('change'))", axis
    )
    labels = "return [...document.querySelectorAll('[data-chart=arrived] svg .role-axis-label text')].map(e => e.textContent)"
    wanted = " h" if axis == "hours" else ":"
    assert until(lambda: any(wanted in text for text in page.js(labels))), page.js(labels)
    assert page.is_drawn()
    assert browser.get_log("browser") == []
    page.js("const s = document.getElementById('axis'); s.value = 'step'; s.dispatchEvent(new Event('change'))")


def test_the_theme_can_be_chosen(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    for expected in ("rgb(255, 255, 255)", "rgb(16, 20, 24)", "rgb(255, 255, 255)"):  # light, dark, system
        page.js("document.getElementById('theme').click()")
        assert page.is_drawn()
        assert page.js("return getComputedStyle(document.body).backgroundColor") == expected


def test_everything_can_be_taken_along_as_text(browser, tmp_path, mixed):
    page = Page(browser, to_file(tmp_path, mixed))
    page.js("window.copied = []; navigator.clipboard.writeText = async (text) => { window.copied.push(text); }")
    page.js("document.getElementById('markdown').click()")
    assert until(lambda: page.js("return window.copied.length") == 1)
    text = page.js("return window.copied[0]")
    assert text.startswith("**BROKEN") or text.startswith("**broken")
    assert "| Tensor | Health | Arrived |" in text
    page.js(
        "HTMLAnchorElement.prototype.click = function () { window.saved = [this.download, decodeURIComponent(this.href)]; }"
    )
    page.js("document.getElementById('csv').click()")
    name, content = page.js("return window.saved")
    assert name == "gpt-mixed.csv"
    assert len(content.strip().split("\n")) == 1 + len(MIXED)


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
    assert until(lambda: "second" in browser.title)
    assert page.is_drawn()


def test_hostile_names_are_shown_as_text_and_never_run(browser, tmp_path):
    page = Page(
        browser, to_file(tmp_path, render_html([history_of(hostile_run(), HOSTILE), history_of(hostile_run(), "b")]))
    )
    page.js("document.querySelectorAll('#table .row').forEach(e => e.click())")
    page.js("document.querySelectorAll('details').forEach(e => { e.open = true })")
    from selenium.webdriver import ActionChains

    find = "document.documentElement.style.scrollBehavior = 'auto'; const e = document.querySelector('[data-chart=map-0] svg .mark-rect path'); e.scrollIntoView({block: 'center'}); return e"
    tooltip = "return document.getElementById('vg-tooltip-element')?.innerText || ''"
    offsets = itertools.cycle((-8, -4, 0, 4, 8))

    def is_shown() -> bool:  # the chart may still be drawn or move: the pointer goes over its rows until one answers
        ActionChains(browser).move_to_element_with_offset(page.js(find), next(offsets), 0).perform()
        time.sleep(0.2)
        return "onerror" in page.js(tooltip)

    assert until(is_shown), page.js(tooltip)
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
    assert until(lambda: empty_charts(page) == []), empty_charts(page)
    boxes = [
        page.js(
            f"const b = document.querySelector('[data-chart=heatmap-{i}]').getBoundingClientRect(); return [b.x, b.y]"
        )
        for i in (0, 1)
    ]
    assert boxes[0][1] == boxes[1][1]
    assert boxes[0][0] < boxes[1][0]
    assert set(page.column("Run")) == {"bf16", "fp32"}
    page.js("document.querySelector('#runchips button').click()")  # a run switched off leaves charts and table
    assert page.is_drawn()
    assert set(page.column("Run")) == {"fp32"}
    assert page.js("return document.querySelector('[data-chart=map-0]').offsetParent") is None


@pytest.mark.parametrize("width", [390, 1240])
@pytest.mark.slow
def test_nothing_makes_the_page_wider_than_the_window(browser, tmp_path, mixed, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, to_file(tmp_path, mixed))
        assert page.js("return document.documentElement.scrollWidth") <= width
        page.js("document.querySelector('#table .row').click()")
        opened = "document.querySelector('#table .detail .inside').getBoundingClientRect()"
        assert page.js(f"return {opened}.right") <= width
        names = page.js("return [...document.querySelectorAll('#table td.name')].map(e => [e.title, e.textContent])")
        layers = [(re.search(r"[.](\d+)[.]", whole), shown) for whole, shown in names]
        assert [shown for number, shown in layers if number and number[1] not in shown] == []  # a layer stays told
        rows = "['heatmap-0', 'headroom-0'].map(id => document.querySelector(`[data-chart='${id}']`))"
        page.js("document.querySelectorAll('details').forEach(e => { e.open = true; })")
        assert until(lambda: page.js(f"return {rows}.every(e => e === null || e.drawn)"))
        # names of rows leave the chart most of the width
        shares = page.js(f"return {rows}.filter(e => e).map(e => e.drawn.view.width() / e.clientWidth)")
        assert len(shares) == 2 and min(shares) > 0.6
        several = [history_of(list(synthetic_run(gpt(1), windows=4, seed=i)), f"run {i}") for i in range(5)]
        page = Page(browser, to_file(tmp_path, render_html(several)))
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
    cells = page_data(text)["charts"]["heatmap-0"]["layer"][0]["data"]["values"]
    assert any(c["verdict"] == "stalled" and c["begin"] < 646_400 <= c["end"] for c in cells)
    # Time of the page's main thread on the processor: what other programs do meanwhile does not count.
    browser.execute_cdp_cmd("Performance.enable", {"timeDomain": "threadTicks"})
    page = Page(browser, to_file(tmp_path, text))
    metrics = {m["name"]: m["value"] for m in browser.execute_cdp_cmd("Performance.getMetrics", {})["metrics"]}
    browser.execute_cdp_cmd("Performance.disable", {})
    assert page.console == []
    assert until(lambda: empty_charts(page) == []), empty_charts(page)
    assert metrics["TaskDuration"] < 2.0, metrics
    started = time.process_time()
    assert page.js("return document.querySelectorAll('#table .row').length") == 30
    page.js("[...document.querySelectorAll('#moretensors button')].at(-1).click()")
    assert len(page.names()) == 2000
    assert time.process_time() - started < 2.0
