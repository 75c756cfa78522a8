"""Real training, the real watch, the real sinks: what W&B, the journal, the report and the terminal hold is what was seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import wandb
from torch import nn

import update_watch as uw
from tests.support.wandb.samples import OfflineRun
from update_watch.dashboards import WandbSink
from update_watch.dashboards.journal import Journal, read_journal
from update_watch.dashboards.report.html import write_report
from update_watch.report import Report


def test_what_training_showed_is_in_wandb_and_in_the_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    settings = wandb.Settings(console="off", x_disable_stats=True)
    run = wandb.init(mode="offline", project="p", dir=tmp_path, settings=settings, reinit="finish_previous")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 48), nn.RMSNorm(48), nn.Linear(48, 40)).to(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    seen: list[Report] = []
    journal = tmp_path / "run.jsonl"
    sinks: list[Any] = [WandbSink(run), Journal(journal), seen.append]
    with uw.watch(model, optimizer, window=16, sinks=sinks) as watch:
        for _ in range(48):
            x = torch.randn(16, 40, dtype=torch.bfloat16)
            optimizer.zero_grad()
            (model(x) - x).pow(2).mean().backward()
            optimizer.step()
        watch.flush()
    run.finish()
    offline = OfflineRun(run)
    rows = [row for row in offline.history if "update_watch/efficiency" in row]
    assert [row["trainer/global_step"] for row in rows] == [r.step for r in seen] == [16, 32, 48]
    for row, report in zip(rows, seen, strict=True):
        assert row["update_watch/efficiency"] == pytest.approx(report.efficiency)
        norm = next(t for t in report.tensors if t.name == "1.weight")
        assert row["update_watch/by_kind/1"] == pytest.approx(norm.efficiency)
    norm = next(t for t in seen[-1].tensors if t.name == "1.weight")
    assert norm.health is uw.Health.stalled  # meta: there was something to tell
    assert [a.title for r in seen for a in r.alerts]
    kept = list(read_journal(journal))
    assert [(r.step, r.headline, r.alerts) for r in kept] == [(r.step, r.headline, r.alerts) for r in seen]
    for back, report in zip(kept, seen, strict=True):
        assert [(t.name, t.health, t.cause) for t in back.tensors] == [
            (t.name, t.health, t.cause) for t in report.tensors
        ]
        for a, b in zip(back.tensors, report.tensors, strict=True):
            assert (a.efficiency, a.lost_fraction) == pytest.approx((b.efficiency, b.lost_fraction), rel=1e-3, abs=1e-4)
    page = tmp_path / "report.html"
    write_report([journal], page)
    text = page.read_text()
    assert "1.weight does not train" in text or "1.weight no longer trains" in text
