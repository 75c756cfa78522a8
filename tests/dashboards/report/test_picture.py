"""A picture of the page, drawn by a browser."""

from __future__ import annotations

import struct

import pytest

from tests.support.report_pages import write_journal
from tests.support.run_samples import gpt, synthetic_run
from update_watch.dashboards.report.html import write_report
from update_watch.dashboards.report.picture import BROWSERS, find_browser

pytest.importorskip("vl_convert", reason="vl-convert-python is not installed")
pytest.importorskip("jinja2", reason="jinja2 is not installed")

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
    assert height > 2 * 1500


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
