"""`update-watch run` on training scripts that nobody edits: the same to the bit, the verdicts of a watch that is given the optimizer.

    python bench/run_unchanged.py [--only WORDS]

Each script of `bench/unchanged/` trains in BF16 and in FP32, three times: alone, under `update-watch run`, and edited by the
line or two of the docs. Held against each other: all weights and a number drawn at the end (to the bit, also of the edited
one), and name, health and cause of every tensor in the last window. litgpt's pretraining is left out, and said, where
litgpt is not installed. Exit status 1 if anything differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch

from update_watch.dashboards import read_journal

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted(path for path in (ROOT / "bench" / "unchanged").glob("*.py") if path.stem != "__init__")
NEEDS = {"litgpt_pretraining": "litgpt", "transformers_trainer": "transformers", "lightning_module": "lightning"}
RUN = (sys.executable, "-m", "update_watch", "run", "--window", "16", "--journal", "run.jsonl")
STEPS = 64

Verdicts = dict[str, tuple[str, str]]  # name -> health, cause


def train(script: Path, folder: Path, *words: str, watched: bool = False) -> Any:
    """Run it in `folder`; what it stored."""
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29541"]
    command = [sys.executable, *(start if script.stem == "two_ranks" else []), str(script), "out.pt", *words]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*(RUN if watched else ()), *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{script.stem} {words} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return torch.load(folder / "out.pt", weights_only=True)


def differing(a: Any, b: Any) -> list[str]:
    """Names of what is not the same to the bit."""
    weights, others = a["model"], b["model"]
    names = [name for name in weights.keys() | others.keys() if not _same(weights.get(name), others.get(name))]
    return names + ([] if torch.equal(a["drawn"], b["drawn"]) else ["random state"])


def _same(a: Any, b: Any) -> bool:
    return a is not None and b is not None and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def verdicts(journal: Path) -> Verdicts:
    """Of the last window."""
    last = list(read_journal(journal))[-1]
    if last.step not in (STEPS, STEPS - 1):  # loggers of Lightning count from 0
        raise RuntimeError(f"{journal}: the last window ends at step {last.step}, not at {STEPS}")
    return {t.name: (str(t.health), str(t.cause)) for t in last.tensors}


def compare(script: Path, form: str) -> list[str]:
    """Train it three times; what differs. Prints a row."""
    words = ("bf16",) if form == "bf16" else ()
    with tempfile.TemporaryDirectory() as name:
        folders = [Path(name, way) for way in ("alone", "run", "given")]
        for folder in folders:
            folder.mkdir()
        alone, run, given = folders
        plain = train(script, alone, *words)
        wrong = [f"under run: {name}" for name in differing(plain, train(script, run, *words, watched=True))]
        wrong += [f"given: {name}" for name in differing(plain, train(script, given, *words, "given"))]
        found, expected = verdicts(run / "run.jsonl"), verdicts(given / "out.pt.jsonl")
    wrong += [
        f"{name}: {found.get(name)} under run, {expected.get(name)} given"
        for name in sorted(found.keys() | expected.keys())
        if found.get(name) != expected.get(name)
    ]
    counts = ", ".join(
        f"{count} {health}" for health, count in Counter(health for health, _ in found.values()).most_common()
    )
    print(f"{script.stem:22} {form:5} {counts:45} {'the same' if not wrong else f'{len(wrong)} differ'}", flush=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", default="", help="scripts whose name contains this")
    given = parser.parse_args()
    scripts = [path for path in SCRIPTS if given.only in path.stem]
    if not scripts:
        parser.error(f"--only {given.only!r}: no script has this in its name")
    print(f"{'script':22} {'form':5} {'last window under update-watch run':45} weights, random state, verdicts")
    wrong = []
    for script in scripts:
        package = NEEDS.get(script.stem)
        if package is not None and find_spec(package) is None:
            print(f"{script.stem:22} left out: {package} is not installed")
            continue
        for form in ("bf16", "fp32"):
            wrong += [f"{script.stem} in {form}, {line}" for line in compare(script, form)]
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
