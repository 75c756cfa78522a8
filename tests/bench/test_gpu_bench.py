"""`bench/gpu.py` on the CPU, in small: every section runs alone, and what one raises leaves the others' results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "bench" / "gpu.py"


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_on_the_cpu(tmp_path: Path) -> None:
    chosen = ["environment", "syncs", "step_time", "truth", "soak", "graphs"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--device", "cpu", "--quick", "--out", str(tmp_path), "--only", *chosen],
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode in (0, 1), done.stderr[-2000:]  # 1: a bar is missed, as times here may
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert list(found) == chosen
    assert [name for name, result in found.items() if "failed" in result] == []
    assert found["graphs"] == {"skipped": "CUDA only"}
    assert found["soak"]["error"] == "" and found["soak"]["steps"] == 600
    assert "thousands of steps" in (tmp_path / "gpu.txt").read_text()
