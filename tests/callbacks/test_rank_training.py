"""The same training of two processes under several strategies: each rank has the same report, of all elements."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SHAPES = {
    "net.0.weight": [65, 40],
    "net.0.bias": [65],
    "net.1.weight": [65],
    "net.1.bias": [65],
    "net.3.weight": [3, 65],
    "net.3.bias": [3],
}
_FOUND: dict[str, list[dict[str, Any]]] = {}


def run(kind: str, folder: Path) -> list[dict[str, Any]]:
    if kind not in _FOUND:
        command = [
            sys.executable,
            "-W",
            "ignore",
            str(Path(__file__).parents[1] / "support" / "ranks" / "training.py"),
            kind,
            str(folder),
        ]
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Traceback" not in done.stderr and "update-watch:" not in done.stderr, done.stderr[-3000:]
        _FOUND[kind] = [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]
    return _FOUND[kind]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", "zero1", "transformers"])
def test_both_ranks_report_all_of_the_model_and_one_tells_it(kind: str, tmp_path: Path) -> None:
    first, second = run(kind, tmp_path)
    assert {t["name"]: t["shape"] for t in first["report"]["tensors"]} == SHAPES
    assert first["report"] == second["report"]
    assert (first["told"], second["told"]) == (2, 0)
    assert all(t["efficiency"] is not None for t in first["report"]["tensors"])


@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])  # the HF Trainer gives each rank other batches
def test_what_is_shared_does_not_change_the_numbers(kind: str, tmp_path: Path) -> None:
    """DDP holds all elements on both ranks; the same training with shards gives the same numbers."""
    for name in ("ddp", kind):
        (tmp_path / name).mkdir()
    whole, (shared, _) = run("ddp", tmp_path / "ddp")[0], run(kind, tmp_path / kind)
    for a, b in zip(whole["report"]["tensors"], shared["report"]["tensors"], strict=True):
        assert b["efficiency"] == pytest.approx(a["efficiency"], abs=0.05), a["name"]
        assert b["lost_fraction"] == pytest.approx(a["lost_fraction"], abs=0.05), a["name"]
