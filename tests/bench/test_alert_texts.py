"""The page of alerts is what the code tells, and short enough for a phone."""

from __future__ import annotations

import re

from bench.verdicts.alert_texts import PAGE, page


def test_the_page_of_alerts_is_what_is_told() -> None:
    assert PAGE.read_text() == page()


def test_every_alert_is_readable_in_ten_seconds() -> None:
    texts = re.findall(r"```text\n(.*?)\n```", page(), re.DOTALL)
    assert len(texts) >= 10
    for text in texts:
        assert len(text.split("\n- ")[0].split("\n", 1)[1]) < 600
