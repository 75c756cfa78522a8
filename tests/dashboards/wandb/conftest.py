"""Runs of the real wandb client, offline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def start_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Begins one; what it leaves is below `tmp_path`."""
    import wandb

    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_SILENT", "true")

    def start(reinit: str = "finish_previous", **options: Any) -> Any:
        settings = wandb.Settings(console="off", x_disable_stats=True)
        return wandb.init(mode="offline", project="p", dir=tmp_path, settings=settings, reinit=reinit, **options)

    yield start
    wandb.finish()
