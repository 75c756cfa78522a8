"""Every cure of the trainers that a development environment does not bring, run as it is printed, in a process of its own.

Skipped by name where the trainer is not installed. `tests/support/trainers/` has the scripts.
"""

from __future__ import annotations

import functools
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.trainers.runs import STEPS
from update_watch.cures import switch

ROOT = Path(__file__).parents[2]
RULES = {"kahan": "optimi", "stochastic_rounding": "torchao"}
WEIGHTS = ("masters", "fp32_states", "kahan", "stochastic_rounding")
# trainer -> its stalled trainings; in each the same cures are run
RUNS = {
    "trl": ("plain",),
    "deepspeed": ("plain", "zero-1"),
    "torchtune": ("plain", "in backward"),
    "torchtitan": ("plain",),
    "composer": ("plain",),
}
DECAYS = ("trl", "torchtune", "torchtitan")  # whose cure of a lost decay is their own

pytestmark = pytest.mark.slow


def environment() -> dict[str, str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        **{"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "COLUMNS": "200"},
    }


@functools.cache
def trained(trainer: str, folder: Path) -> tuple[dict[str, Any], list[bool]]:
    """What was told of each training of the trainer's script, and whether those with and without a watch are the same."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.support.trainers.with_{trainer}", *([str(folder)] if trainer == "trl" else [])],
        **{"env": environment(), "cwd": folder, "capture_output": True, "text": True},
        timeout=500,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    runs = [json.loads(line.removeprefix("RUN ")) for line in lines if line.startswith("RUN ")]
    return {run["run"]: run for run in runs}, [line == "SAME True" for line in lines if line.startswith("SAME ")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainers")


def runs_of(trainer: str, folder: Path) -> dict[str, Any]:
    pytest.importorskip(trainer if trainer != "deepspeed" else "hjson")  # which DeepSpeed brings; its import prints
    return trained(trainer, folder)[0]


@pytest.mark.parametrize("trainer", RUNS)
def test_a_stall_is_named_in_the_words_of_the_trainer_and_training_is_the_same(trainer: str, folder: Path) -> None:
    told = runs_of(trainer, folder)
    assert trained(trainer, folder)[1] == [True] * len(RUNS[trainer])
    for name in RUNS[trainer]:
        stalled = {tensor for tensor, health in told[name]["health"].items() if health == "stalled"}
        assert any("norm" in tensor for tensor in stalled)
        assert not any("norm" in tensor for tensor in told[name]["moved"])
        assert "BF16 weights without an FP32 master" in told[name]["headline"]
        if trainer != "torchtune":  # a recipe run by itself is plain torch; `tune run` is told below
            assert told[name]["trainer"] == trainer
            assert switch(trainer, "bfloat16") in told[name]["headline"]


@pytest.mark.parametrize("cure", WEIGHTS)
@pytest.mark.parametrize(("trainer", "name"), [(trainer, name) for trainer, names in RUNS.items() for name in names])
def test_what_stalled_moves_afterwards(trainer: str, name: str, cure: str, folder: Path) -> None:
    if cure in RULES:
        pytest.importorskip(RULES[cure])
    told = runs_of(trainer, folder)
    stalled = {tensor for tensor, health in told[name]["health"].items() if health == "stalled"}
    norms = {tensor for tensor in stalled if "norm" in tensor}
    cured, moved = told[f"{name} {cure}"], set(told[f"{name} {cure}"]["moved"])
    assert "stalled" not in cured["health"].values()
    if cure == "kahan":  # what is carried moves at every step, the stored part of it where that adds up
        assert all(cured["efficiency"][tensor] > 0.9 for tensor in stalled)
        assert norms & moved
    elif cure == "stochastic_rounding":  # a single element may have no luck
        assert norms <= moved
    else:
        assert stalled <= moved
        assert all(efficiency == pytest.approx(1.0, abs=0.03) for efficiency in cured["efficiency"].values())


@pytest.mark.parametrize("trainer", DECAYS)
def test_a_lost_decay_arrives_afterwards(trainer: str, folder: Path) -> None:
    told = runs_of(trainer, folder)
    assert "stalled" in told["decay"]["decay"]
    assert "stalled" not in told["decay fused_decay"]["decay"]


@pytest.mark.parametrize("given", ["zero-3 given", "zero-3"])
def test_the_third_stage_of_deepspeed_is_seen_whether_its_optimizer_is_given_or_not(given: str, folder: Path) -> None:
    told = runs_of("deepspeed", folder)
    assert told[given]["health"]["norm.weight"] == "stalled"
    assert told[given]["step"] == STEPS
    assert set(told["zero-3 masters"]["health"].values()) == {"healthy"}


TITAN = "tests.support.trainers.with_torchtitan --module tests.support.trainers.tiny_titan --config tiny"
COMMANDS = {
    "torchtune": "torchtune._cli.tune run full_finetune_single_device --config tiny.yaml",
    "torchtitan": f"{TITAN} --debug.seed 1 --training.dtype bfloat16",
}


@pytest.mark.parametrize("trainer", COMMANDS)
def test_the_command_tells_an_unedited_recipe_its_own_words(trainer: str, tmp_path: Path) -> None:
    pytest.importorskip(trainer)
    if trainer == "torchtune":
        from tests.support.trainers.tiny_tune import CONFIG

        (tmp_path / "tiny.yaml").write_text(CONFIG)
    done = subprocess.run(
        [sys.executable, "-m", "update_watch", "run", "--window", str(STEPS), sys.executable, "-m", *COMMANDS[trainer].split()],
        **{"env": {**environment(), "PYTHONWARNINGS": "ignore"}, "cwd": tmp_path, "capture_output": True, "text": True},
        timeout=300,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^update-watch: \d+ of \d+ tensors are stalled since step 1", done.stderr, re.MULTILINE)
    assert switch(trainer, "bfloat16") in done.stderr
