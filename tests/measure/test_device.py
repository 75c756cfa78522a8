"""The step path on an accelerator, proven without one: no host read, no copy to or from the host, operators counted."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[1] / "support" / "fake_device.py"
# views of the tensors that are read: their number is that of the tensors measured in a step
PER_TENSOR = ("aten.as_strided", "aten.select", "aten.slice")


@functools.cache
def _run(count: int, implementation: str, *extra: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(count), implementation, *extra], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["fused", "foreach"])
def test_a_watched_step_never_reads_from_the_device_nor_copies_to_it(implementation: str) -> None:
    few, many = _run(24, implementation), _run(96, implementation)
    assert not few["error"] and not many["error"]
    assert few["reasons"] == many["reasons"] == []  # an error in a replay makes a tensor unknown, and nothing else
    assert many["ops"]["aten.stack.default"] > 0  # it did measure
    # scalar reads are of step counters that torch keeps on the CPU; fused AdamW keeps them on the device
    if implementation == "fused":
        assert "aten._local_scalar_dense.default" not in many["ops"]


@pytest.mark.slow
def test_operators_per_step_do_not_grow_with_the_number_of_parameters() -> None:
    few, many = _run(24, "fused")["ops"], _run(96, "fused")["ops"]

    def beyond_gather(ops: dict[str, float]) -> float:
        return sum(n for name, n in ops.items() if not name.startswith(PER_TENSOR))

    # cohorts of 12: some look at headroom at different steps, which leaves a fraction of an operator
    assert beyond_gather(many) == pytest.approx(beyond_gather(few), rel=0.15)
    assert beyond_gather(many) < 100


@pytest.mark.slow
def test_a_host_read_in_the_step_would_be_seen() -> None:
    assert _run(24, "fused", "seeded")["error"]
    assert not _run(24, "fused")["error"]
