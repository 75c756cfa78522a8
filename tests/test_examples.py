"""Every example runs as it stands, in a process of its own, and says what its first lines promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
STALLED = r"2 of 6 tensors are stalled since step \d \((net\.)?3\.bias, (net\.)?1\.weight\): BF16 weights without an FP32 master round the updates away"
HEALTHY = r"All 6 tensors are healthy \(efficiency 1.00\)\."

CASES = {
    "plain_torch.py": [
        rf"^torch.bfloat16: {STALLED}",
        r"^  1.weight   stalled   efficiency 0.00$",
        r"^  1.bias     healthy   efficiency (1.0\d|0.9\d)$",
        rf"^torch.float32: {HEALTHY}$",
    ],
    "lightning_one_line.py": [r"^update-watch: ", r"Expected at these settings: weights in BF16", rf"^{STALLED}"],
    "lightning_one_line.py bf16-mixed": [r"^update-watch: 6 tensors watched; nothing", rf"^{HEALTHY}$"],
    "lightning_fsdp2.py": [rf"^{STALLED}", r"^  net.1.weight   \(128,\) stalled efficiency 0.00$"],
    "fabric.py": [rf"^{STALLED}"],
    "accelerate_loop.py": [rf"^{STALLED}", r"Accelerator\(mixed_precision='bf16'\)"],
    "ignite_handlers.py": [rf"^{STALLED}"],
    "skorch_callback.py": [rf"^{STALLED}"],
    "fastai_callback.py": [rf"^{STALLED}"],
    "composer_callback.py": [rf"^{STALLED}", r"Trainer\(model=model.float\(\), precision='amp_bf16'\)"],
    "hf_trainer.py": [
        r"'efficiency': '0\.\d+', 'stalled': \d",
        r"^update-watch: 5 of 21 tensors are stalled since step 1 \(all 5 norms\): BF16",
    ],
    "hf_trainer.py float32": [r"^update-watch: 21 tensors watched; nothing", r"^All 21 tensors are healthy"],
}


NEEDS = {"lightning": ["lightning"], "fabric": ["lightning"], "hf": ["transformers", "accelerate"]}  # else: by its name


@pytest.mark.slow
@pytest.mark.parametrize("command", CASES)
def test_example_says_what_it_promises(command: str, tmp_path: Path) -> None:
    name, *arguments = command.split()
    first = re.split(r"[_.]", name)[0]
    for package in NEEDS.get(
        first, [first] if first in ("accelerate", "ignite", "skorch", "fastai", "composer") else []
    ):
        pytest.importorskip(package)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / name), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for pattern in CASES[command]:
        assert re.search(pattern, done.stdout, re.MULTILINE), f"{pattern}\n{done.stdout[-3000:]}"


def test_every_example_is_run() -> None:
    assert {path.name for path in EXAMPLES.glob("*.py")} == {command.split()[0] for command in CASES}
