"""The HTML report: what it says, that it is one offline file, and that it is written anew while a run goes on."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import html
import re
import sys
import threading
import types
from pathlib import Path

import pytest

from tests.support.report_pages import HOSTILE, MIXED, hostile_run, page_data, until, visible, write_journal
from tests.support.run_samples import CURE, gpt, synthetic_run
from update_watch.dashboards.frame import TensorTable, frame_of
from update_watch.dashboards.journal import Journal, JournalError
from update_watch.dashboards.report.cases import MOST, case_rows
from update_watch.dashboards.report.history import history_of, read_history
from update_watch.dashboards.report.html import read_runs, render_html, write_report
from update_watch.foresight.forecasts import Forecast
from update_watch.report import HEADROOM_BINS, HEADROOM_LOW, Alert, Cause, Health, Level, Report, TensorReport

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

# --- what it says ----------------------------------------------------------------------------------------


def test_the_verdict_names_kinds_and_the_page_has_the_cure_as_code(mixed):
    words = visible(mixed)
    assert "holds NaN or infinity" in words
    assert CURE in words  # in what was found, with its advice


def test_a_stalled_run_has_code_to_paste_for_every_trainer_with_what_it_costs():
    run = {"trainer": "lightning", "optimizer": "AdamW"}
    page = render_html([history_of(list(synthetic_run(gpt(1), windows=20)), run=run)])
    codes = page_data(page)["cures"][0]
    assert 'precision="bf16-mixed"' in codes["masters"]["lightning"]
    assert "dtype=torch.float32" in codes["masters"]["transformers"]
    assert set(codes) == {"masters", "stochastic_rounding", "kahan"}
    words = visible(page)
    assert "All 3 norms" in words
    assert "FP32 masters +" in words
    assert words.index("Lightning") < words.index("HF Trainer")  # the run's own trainer first
    assert "AdamW" in words


def test_no_line_of_the_verdict_breaks_within_a_number_and_no_column_is_empty():
    page = render_html([history_of(list(synthetic_run(gpt(1), windows=20)))])
    reason = re.findall(r'<p class="reason">(.*?)</p>', page, re.S)[0]
    assert re.search(r'learning rate <span class="whole">\d[.\d]*e-\d</span>', reason)
    assert "whole" in reason and not re.search(r"\de-\d", re.sub(r'<span class="whole">.*?</span>', "", reason))
    assert re.search(r'<span>learning rate now <span class="whole">\d[.\d]*e-\d</span></span>', page)
    assert re.search(r'\(now <span class="whole">', re.findall(r'<ol class="findings">(.*?)</ol>', page, re.S)[0])
    hostile = history_of([dataclasses.replace(hostile_run()[0], headline=HOSTILE)])
    assert HOSTILE not in render_html([hostile]).split('id="data"')[0]
    cases = re.findall(r'aria-label="What each change would give.*?</table>', page, re.S)[0]
    head, *rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr>(.*?)</tr>", cases)]
    assert len(rows) >= 2
    for i, title in enumerate(head):
        assert any(row[i] for row in rows), title


def test_one_number_is_called_arrived_and_no_other_efficiency_is_on_the_first_screen(mixed):
    first = visible(mixed.split('id="where"')[0])
    assert "Arrived, of each update:" in first
    for word in ("efficiency", "net progress", "wanted", "octave", "cohort", "weight_rounding"):
        assert word not in first.lower()


def test_the_summary_counts_every_health(mixed):
    report = list(synthetic_run(MIXED, windows=20))[-1]
    for health, count in report.counts.items():
        if count:
            assert f"{health} {count}" in visible(mixed)


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
        assert _close(row["margin"], t.lr / t.critical_lr if t.critical_lr else None)
        assert {a[0] for a in row["accumulators"]} == set(t.accumulators)


def _close(shown: float | None, value: float | None) -> bool:
    return shown is value or (shown is not None and value is not None and abs(shown - value) <= 6e-3 * abs(value))


def test_a_healthy_run_says_that_nothing_stalls_and_nobody_was_alerted():
    words = visible(render_html([history_of(list(synthetic_run(gpt(1), windows=3, precision="fp32")))]))
    assert "All 16 tensors get their updates." in words
    assert "Room: the learning rate may fall" in words
    assert "Nothing stalls: every update that should arrive does." in words
    assert "What to change" not in words
    assert "No alert: nothing changed that anybody had to hear of." in words
    assert "stored in float32: the band shows where they would stand in BF16" in words


def test_a_run_of_which_nothing_is_known_says_why_and_draws_no_empty_chart():
    advice = "Unknown, because the rule draws random numbers."
    report = Report(10, 10, Health.unknown, "Unknown.", (TensorReport("a", Health.unknown, advice=advice),))
    page = render_html([history_of([report])])
    words = visible(page)
    assert "No verdict: the one tensor cannot be measured." in words
    assert "What to do Draw outside of the optimizer's step" in words
    assert advice in words
    assert set(page_data(page)["charts"]) == {"map-0"}
    for title in ("How large the updates are", "How far each update is", "What the optimizer keeps"):
        assert title not in words


def test_a_run_in_which_nothing_is_trained_says_so_and_why():
    text = "Its learning rate was 0 in all 10 steps of this window; check the schedule and its parameter group."
    tensors = [TensorReport(f"h.{i}.w", Health.idle, Cause.zero_learning_rate, text) for i in range(4)]
    words = visible(render_html([history_of([Report(10, 10, Health.idle, "", tuple(tensors))])]))
    assert "Nothing is being trained: the learning rate is zero or has run out." in words
    assert "All 4 tensors : its learning rate was 0 in all 10 steps of this window." in words
    assert "What to do Check the schedule and its parameter group." in words


def test_a_thinned_or_damaged_journal_is_named_as_such(tmp_path):
    path = write_journal(tmp_path / "j.jsonl", list(synthetic_run(gpt(1), windows=3)))
    path.write_bytes(path.read_bytes() + b"{broken\n")
    words = visible(render_html([read_history(path)]))
    assert "1 damaged line of the journal could not be read" in words
    reports = [Report(10 * n, 10, Health.healthy, "", (TensorReport("a", Health.healthy),)) for n in range(1, 2001)]
    words = visible(render_html([history_of(reports)]))
    assert "2,000 windows. A point over the run stands for about 10: numbers of the run are their mean" in words


def test_many_alerts_are_listed_newest_first_and_the_others_are_counted():
    tensor = TensorReport("a", Health.healthy)
    reports = [
        Report(10 * n, 10, Health.healthy, "", (tensor,), alerts=(Alert(10 * n, Level.warn, f"alert {n}", "text"),))
        for n in range(1, 101)
    ]
    words = visible(render_html([history_of(reports)]))
    assert words.index("alert 100") < words.index("alert 99") < words.index("alert 61")
    assert "alert 60" not in words
    assert "60 more alerts are in the journal." in words


def test_runs_side_by_side_have_their_names_verdicts_and_rows():
    runs = [history_of(list(synthetic_run(gpt(1), windows=4, precision=p)), p) for p in ("bf16", "fp32")]
    text = render_html(runs)
    data = page_data(text)
    assert data["runs"] == ["bf16", "fp32"]
    assert "2 runs side by side" in visible(text)
    maps = data["maps"]
    assert maps[0]["rows"] == maps[1]["rows"]  # the same rows in the same order
    assert (
        data["charts"]["heatmap-0"]["layer"][0]["encoding"]["x"]["scale"]
        == (data["charts"]["heatmap-1"]["layer"][0]["encoding"]["x"]["scale"])
    )
    run = data["tensors"]["fields"].index("run")
    assert {row[run] for row in data["tensors"]["rows"]} == {0, 1}


def test_every_run_of_many_has_a_colour():
    report = Report(10, 10, Health.unknown, "Unknown.", (TensorReport("a", Health.unknown),))
    page = render_html([history_of([report], f"run {i}") for i in range(11)])
    used = re.findall(r'<i class="swatch s(\d+)">', page)
    colours = [re.findall(rf"--run-{i}:(#\w+);", page) for i in used]
    assert len(used) == 11 and len({light for light, *_ in colours}) == 10  # the eleventh has that of the first
    assert all(f".s{i}{{background:var(--run-{i})}}" in page for i in used)


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


def test_nothing_from_a_run_becomes_markup():
    text = render_html([history_of(hostile_run(), HOSTILE)])
    tags = re.findall(
        r"<(img|script|iframe|object|link|svg)\b[^>]*>",
        re.sub(r"(<script>)(.*?)(</script>)", r"\1\3", text, flags=re.S),
    )
    assert tags == ["script"] * 3  # data, library, the page's own
    assert text.count("</script>") == 3
    assert visible(text).count(HOSTILE.split('"')[1].split("'")[1]) > 0  # it is there, as text


def test_a_name_cannot_turn_the_writing_direction_and_read_as_another() -> None:
    turned = "x.\u202eevil\u2066\u200f", "y\\u202e.straight"  # the second says it, and does not do it
    reports = [
        dataclasses.replace(
            report,
            tensors=tuple(
                dataclasses.replace(t, name=f"{turned[i % 2]}.{i}", names=(f"{turned[i % 2]}.{i}",))
                for i, t in enumerate(report.tensors)
            ),
        )
        for report in synthetic_run(gpt(1), windows=4)
    ]
    page = render_html([dataclasses.replace(history_of(reports), name="run\u202ename")])
    data = page.split('type="application/json"')[1].split("</script>")[0]
    assert "x.\\ufffdevil" in data and "\\u202e" not in data.replace("\\\\u202e", "")
    assert "y\\\\u202e.straight" in data
    assert not set(re.sub(r"<script.*?</script>", "", page, flags=re.S)) & set("\u202e\u2066\u200f")
    assert "run\ufffdname" in page


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
    from update_watch.dashboards.report import vega as module

    module.vega.cache_clear()
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    with pytest.raises(ImportError, match=r"needs vl-convert-python: pip install 'update-watch\[report\]'"):
        render_html([history_of(hostile_run())])


def test_vegas_scripts_are_made_once_and_anew_where_what_is_kept_is_not_what_was_made(tmp_path, monkeypatch):
    from update_watch.dashboards.report.vega import vega

    made = []
    maker = types.SimpleNamespace(
        __version__="7", javascript_bundle=lambda snippet: made.append(snippet) or "var é;</script"
    )
    monkeypatch.setitem(sys.modules, "vl_convert", maker)
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "update-watch" / "vega-7.js"

    def scripts() -> str:
        vega.cache_clear()
        return vega()

    assert scripts() == scripts() == "var é;<\\/script" and len(made) == 1
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]
    for damage in (kept.read_bytes()[:-1], kept.read_bytes().replace(b"var", b"bar"), b"", b"\xff\n"):
        kept.write_bytes(damage)
        assert scripts() == "var é;<\\/script"
    assert len(made) == 5
    maker.__version__ = "8"
    scripts()
    assert len(made) == 6
    monkeypatch.setenv("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME", str(kept))  # no folder
    assert scripts() == "var é;<\\/script" and len(made) == 7
    vega.cache_clear()


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
            assert until(lambda r=report: out.exists() and f"{r.step:,} steps" in visible(out.read_text("utf-8")))
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


def test_the_page_says_what_each_change_would_give() -> None:
    movement = tuple(float(i == -HEADROOM_LOW) for i in range(HEADROOM_BINS))  # from half a gap to a whole one
    given = {"dtype": "bfloat16", "shape": (8, 8), "numel": 64, "efficiency": 0.5, "movement_histogram": movement}
    tensors = [
        TensorReport(name, Health.stalling, movement_lr=1e-3, lr=1e-3, **given)  # type: ignore[arg-type]
        for name in ("a.weight", "b.weight")
    ]
    forecast = Forecast(128, 1000, (), 1.0, 0.5, 200, 4e-3, "It will stall.")
    report = Report(128, 128, Health.stalling, "", tuple(tensors), forecast=forecast)
    rows = {row.title: row for row in case_rows(frame_of(report))}
    assert rows["As it is"][1:] == ("50%", "", "2 of 2", "", "+0 B")
    assert rows["Keep FP32 master weights"].losing == "0 of 2"
    floor = rows["A learning rate of at least 0.004"]
    assert floor.between.endswith("to 100%") and floor.losing == "0 of 2"
    assert floor.doubt == "" and not floor.arrives.startswith("about")
    # at this one they come to lie about half a gap, and how large they are then is not known
    doubtful = dataclasses.replace(
        report, tensors=tuple(dataclasses.replace(t, lr=1e-3, movement_lr=4e-3) for t in tensors), forecast=forecast
    )
    (floor,) = (row for row in case_rows(frame_of(doubtful)) if "learning rate" in row.title)
    assert floor.arrives.startswith("about ") and (floor.losing, floor.doubt) == ("0 to 2 of 2", "2 of 2")
    page = render_html([history_of([report], "run")])
    assert "What each change would give" in page and "A learning rate of at least 0.004" in page
    assert case_rows(dataclasses.replace(frame_of(report), table=_many())) == ()


def _many() -> TensorTable:
    return TensorTable(*((("w",) * (MOST + 1),) * len(TensorTable._fields)))
