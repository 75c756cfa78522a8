"""A million tensors: how long `report`, `top --once` and `diff` take, and what they hold.

    python bench/dashboards/million.py [--tensors 1000000] [--windows 4] [--only report|top|diff] [--folder FOLDER]

The journal's windows are those of a real training in BF16 with all that a window holds (verdicts, sentences, histograms,
optimizer state), laid over a mixture of experts of as many tensors; the checkpoints hold as many tensors of 8 elements, a
third of which moved. Each command runs in a process of its own. Prints a line for each: processor seconds (user and
system), the most memory it held, and how large the page or the text is; and how long the last window takes to be written.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
import torch
from torch import nn

import update_watch as uw
from update_watch.dashboards.frame import Columns, Frame, TensorTable, frame_of
from update_watch.dashboards.journal.lines import encode, header_line, window_line
from update_watch.dashboards.journal.table import table_line
from update_watch.dashboards.run_numbers import run_numbers

_STEPS = 16  # per window
_LAYERS, _PER_EXPERT = 64, 3


def names_of(count: int) -> list[str]:
    """Of a mixture of experts: norms and attention in each layer, the rest in experts."""
    parts = ("input_layernorm", "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    plain = [f"model.layers.{layer}.{part}.weight" for layer in range(_LAYERS) for part in parts][:count]
    experts = -(-(count - len(plain)) // (_LAYERS * _PER_EXPERT))
    inner = [
        f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"
        for layer in range(_LAYERS)
        for expert in range(experts)
        for part in ("gate", "up", "down")
    ]
    return (plain + inner)[:count]


def real_windows(count: int) -> list[Frame]:
    """Of a training in BF16 whose norms stall."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.RMSNorm(16), nn.Linear(16, 16)) for _ in range(8))).bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    reports: list[uw.Report] = []
    with uw.watch(model, optimizer, window=_STEPS, budget=None, sinks=[reports.append]):
        for _ in range(count * _STEPS):
            x = torch.randn(8, 16, dtype=torch.bfloat16)
            optimizer.zero_grad()
            (model(x) - x.roll(1, -1)).square().mean().backward()
            optimizer.step()
    return [frame_of(report) for report in reports]


def laid_over(frame: Frame, names: Sequence[str]) -> Frame:
    """The same window of as many tensors as there are names: those of `frame`, again and again."""
    count = len(names)

    def many(values: Any) -> Any:
        return None if values is None else np.take(values, np.arange(count) % len(values), axis=0)

    def columns(found: Columns) -> Columns:
        old = len(found.health)
        advice = {i: found.advice[i % old] for i in range(count) if i % old in found.advice}
        numbers = {name: many(values) for name, values in found.numbers.items()}
        dtype = tuple(found.dtype[i % old] for i in range(count)) if found.dtype else ()
        return Columns(many(found.health), many(found.cause), numbers, advice, dtype)

    old = frame.table
    columns_of = {field: tuple(getattr(old, field)[i % len(old.name)] for i in range(count)) for field in old._fields}
    layers = tuple(name.rpartition(".")[0] for name in names)
    table = TensorTable(**{**columns_of, "name": tuple(names), "names": ((),) * count, "layer": layers})
    tensors = columns(frame.tensors)
    return dataclasses.replace(
        frame,
        table=table,
        tensors=tensors,
        headroom=many(frame.headroom),
        movement=many(frame.movement),
        places=many(frame.places),
        what_if={name: many(values) for name, values in frame.what_if.items()},
        accumulators={name: columns(found) for name, found in frame.accumulators.items()},
        run=run_numbers(table.numel, tensors.health, tensors.numbers),
        alerts=tuple(dataclasses.replace(alert, tensors=()) for alert in frame.alerts),
    )


def write_journal(path: Path, tensors: int, windows: int) -> dict[str, Any]:
    """A journal of so many windows of so many tensors; processor seconds and size of the last."""
    names = names_of(tensors)
    with path.open("wb") as file:
        file.write(encode(header_line({"name": "million"}, 0.0)))
        table = ""
        for frame in real_windows(windows):
            many = laid_over(frame, names)
            if not table:
                line = table_line(many.table)
                table = line["table"]
                file.write(encode(line))
            started = time.process_time()
            size = file.write(encode(window_line(many, table)))
            took = time.process_time() - started
    return {"what": "a window is written", "cpu_s": round(took, 1), "output_mb": round(size / 1e6, 2)}


def write_checkpoints(first: Path, second: Path, tensors: int, elements: int = 8) -> None:
    """Two folders of safetensors, in four files each: a third of the tensors moved, a third holds 1.0 throughout."""
    size = 2 * elements
    names = names_of(tensors)
    values = torch.randn(tensors, elements, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[1::3] = 1.0
    for path, moved in ((first, 0.0), (second, 0.01)):
        path.mkdir()
        found = values.clone()
        found[::3, ::2] *= 1 + moved
        for k, part in enumerate(np.array_split(np.arange(tensors), 4)):
            header = {
                names[i]: {"dtype": "BF16", "shape": [elements], "data_offsets": [at * size, (at + 1) * size]}
                for at, i in enumerate(part.tolist())
            }
            text = json.dumps(header, separators=(",", ":")).encode()
            data = found[torch.from_numpy(part)].view(torch.uint8).numpy().tobytes()
            (path / f"part-{k}.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)


def measure(label: str, arguments: Sequence[str], page: Path | None = None) -> dict[str, Any]:
    """Run the command; processor seconds and memory of its process."""
    script = (
        "import sys, time; from update_watch.cli import main; status = main(sys.argv[1:]); most = next(line.split()[1] for line"
        " in open('/proc/self/status') if line.startswith('VmHWM')); sys.stderr.write(f'{time.process_time()} {most}');"
        " sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{label}: {done.stderr[-500:]}")
    seconds, kilobytes = map(float, done.stderr.split()[-2:])
    size = len(done.stdout) if page is None else page.stat().st_size
    return {
        "what": label,
        "cpu_s": round(seconds, 1),
        "peak_mb": round(kilobytes / 1e3),
        "output_mb": round(size / 1e6, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tensors", type=int, default=1_000_000)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--only", choices=("report", "top", "diff"))
    parser.add_argument("--folder", type=Path, help="keep the files here, and take those that are there")
    given = parser.parse_args()
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        journal, page = folder / "run.jsonl", folder / "report.html"
        first, second = folder / "first", folder / "second"
        if given.only != "diff" and not journal.exists():
            print(json.dumps(write_journal(journal, given.tensors, given.windows)), flush=True)
        if given.only in (None, "diff") and not first.exists():
            write_checkpoints(first, second, given.tensors)
        commands = {
            "report": (["report", str(journal), "--output", str(page), "--force"], page),
            "top": (["top", str(journal), "--once"], None),
            "diff": (["diff", str(first), str(second)], None),
            "diff --at": (["diff", str(first), str(second), "--at", "3e-5"], None),
        }
        for name, (arguments, output) in commands.items():
            if given.only in (None, name.partition(" ")[0]):
                print(json.dumps(measure(name, arguments, output)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
