"""The terminal's table: what is shown at every width, and that nothing from a run is obeyed."""

from __future__ import annotations

import io
import logging
import re
import sys
from typing import Any

import pytest

from tests.support.run_samples import large, synthetic_run
from update_watch.dashboards.terminal import table
from update_watch.report import Alert, Cause, Health, Level, Report, TensorReport
from update_watch.wording import above_progress_bars

rich_console = pytest.importorskip("rich.console")


def shown(renderable: Any, width: int = 100, **options: Any) -> str:
    file = io.StringIO()
    rich_console.Console(file=file, width=width, legacy_windows=False, **options).print(renderable)
    return file.getvalue()


def names_in_order(text: str, report: Report) -> list[str]:
    names = {t.name for t in report.tensors}
    return [line.split()[0] for line in text.splitlines() if line.split() and line.split()[0] in names]


def small(*tensors: TensorReport, **fields: Any) -> Report:
    return Report(100, 10, Health.stalled, "1 of 2 tensors is stalled.", tensors, **fields)


STALLED = TensorReport(
    "h.0.norm.weight",
    Health.stalled,
    Cause.weight_rounding,
    "BF16 weights round the updates away (efficiency 0.03, 97% lost); keep FP32 master weights.",
    efficiency=0.0312,
    lost_fraction=0.97,
    update_ratio=0.000123,
    numel=10,
)
HEALTHY = TensorReport(
    "h.0.attn.weight", Health.healthy, efficiency=0.998, lost_fraction=0.001, update_ratio=0.01, numel=90
)


def test_the_table_shows_verdict_numbers_cause_and_advice():
    text = shown(table(small(HEALTHY, STALLED, cost_ms=0.25)), width=160)
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == "stalled 1 of 2 tensors is stalled."
    assert lines[1] == "step 100 · 2 tensors: 1 stalled, 1 healthy · efficiency 0.90 · 0.25 ms/step for watching"
    (head,) = (line for line in lines if line.startswith("tensor"))
    assert head == "tensor health efficiency lost update ratio cause advice"
    assert any(line.startswith("h.0.norm.weight stalled 0.03 97% 1.2e-04 rounded away BF16 weights") for line in lines)
    assert "h.0.attn.weight healthy 1.00 <1% 1.0e-02" in lines


def test_the_worst_come_first_and_the_rest_are_counted():
    report = next(synthetic_run(large(2000), windows=1, peak=2e-4, has_states=False))
    text = shown(table(report, rows=12), width=120)
    names = names_in_order(text, report)
    by_name = {t.name: t for t in report.tensors}
    assert len(names) == 12
    efficiencies = [by_name[name].efficiency for name in names]
    assert {by_name[name].health for name in names} == {Health.stalled}
    assert efficiencies == sorted(t.efficiency for t in report.tensors if t.health is Health.stalled)[:12]
    counts = dict(report.counts)
    rest = f"1,988 tensors: {counts['stalled'] - 12:,} stalled, {counts['stalling']:,} stalling, {counts['healthy']:,} healthy"
    assert f"not shown: {rest}" in text


def test_without_a_limit_every_tensor_is_shown():
    report = next(synthetic_run(windows=1))
    assert set(names_in_order(shown(table(report, rows=None), width=120), report)) == {t.name for t in report.tensors}


def test_every_health_comes_before_the_next_better_one():
    order = [Health.broken, Health.stalled, Health.stalling, Health.unknown, Health.idle, Health.frozen, Health.healthy]
    tensors = [TensorReport(h.value, h, efficiency=0.5 if h is Health.stalled else None) for h in reversed(order)]
    text = shown(table(small(*tensors)))
    starts = [line.split()[:2] for line in text.splitlines()]
    names = [start[0] for start in starts if len(start) == 2 and start[0] == start[1]]
    assert names == [h.value for h in order]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 150, 200])
def test_health_and_efficiency_can_be_read_at_every_width(width):
    report = next(synthetic_run(windows=1))
    lines = [line.split() for line in shown(table(report, rows=None), width=width).splitlines()]
    rows = [line for line in lines if len(line) > 3 and line[1] in {"stalled", "stalling", "healthy"}]
    assert sorted((row[1], row[2]) for row in rows) == sorted(
        (t.health.value, f"{t.efficiency:.2f}") for t in report.tensors
    )


def test_the_usual_80_columns_still_show_the_cause():
    assert "rounded away" in shown(table(small(STALLED)), width=80)


def test_a_narrow_terminal_keeps_name_health_and_efficiency_and_says_the_advice_below():
    text = shown(table(small(STALLED)), width=50)
    assert "h.0.norm.weight   stalled     0.03    97%" in text
    assert "keep FP32 master weights" in " ".join(text.split())


def test_a_long_name_is_cut_in_the_middle_and_keeps_layer_and_end():
    name = "layers.17." + "very_long_module." * 6 + "norm.weight"
    text = shown(table(small(TensorReport(name, Health.stalled, efficiency=0.0))), width=60)
    (line,) = (line for line in text.splitlines() if "norm.weight" in line)
    assert line.startswith("layers.17")
    assert "…" in line


@pytest.mark.parametrize("name", ["[bold red]x[/]", "[/nothing]", "a\x1b[2Jb", "a\nb\rc\x07"], ids=repr)
def test_markup_and_escape_sequences_in_names_are_not_obeyed(name):
    tensor = TensorReport(name, Health.stalled, Cause.weight_rounding, name, efficiency=0.5, layer=name)
    report = Report(1, 1, Health.stalled, name, (tensor,), alerts=(Alert(1, Level.warn, name, name),))
    text = shown(table(report), width=160, force_terminal=True, color_system=None)
    assert "".join(c if c.isprintable() else "�" for c in name) in text
    assert not set(text) & {"\x1b", "\r", "\x07"}


def test_a_terminal_without_unicode_gets_ascii():
    name = "x" * 80 + ".größe"
    file = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    rich_console.Console(file=file, width=70).print(table(small(TensorReport(name, Health.stalled), HEALTHY)))
    file.flush()
    assert b"..." in file.buffer.getvalue()


def test_output_that_is_no_terminal_has_no_escape_sequences():
    assert "\x1b" not in shown(table(small(STALLED)))


def test_a_report_without_tensors_shows_its_headline_only():
    text = shown(table(Report(1, 1, Health.unknown, "No tensors are watched.", ())))
    assert text.splitlines()[0] == "unknown No tensors are watched."
    assert "efficiency" not in text


def test_a_missing_rich_is_named_with_its_install_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    with pytest.raises(ImportError, match=r"needs rich: pip install 'update-watch\[terminal\]'"):
        table(small(STALLED))


def test_a_handler_made_before_richs_bar_writes_above_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    handler = logging.StreamHandler()
    logging.getLogger("update_watch").addHandler(handler)
    try:
        console = rich_console.Console(file=terminal, force_terminal=True, width=60)
        with pytest.importorskip("rich.progress").Progress(console=console, auto_refresh=False) as bar:
            bar.add_task("train", total=10)
            bar.refresh()
            with above_progress_bars():
                logging.getLogger("update_watch").error("update-watch, step 5: STALLED")
            assert handler.stream is terminal  # as it was
    finally:
        logging.getLogger("update_watch").removeHandler(handler)
    # a carriage return, the line erased, ours, and the bar anew on the next line
    assert re.search(r"\r\x1b\[2Kupdate-watch, step 5: STALLED\n[^\n]*train", terminal.getvalue())
