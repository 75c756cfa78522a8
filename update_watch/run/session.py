"""In a process of the command: the watch that nobody called for."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from update_watch import endings
from update_watch.measure.hooks.process_steps import leave_place
from update_watch.measure.identity import masters, owners
from update_watch.measure.identity.names import members_of, named_tensors, names_of
from update_watch.report import Report
from update_watch.run.settings import Settings
from update_watch.watch import Watch, watch
from update_watch.wording import above_progress_bars


def begin(optimizer: Optimizer, place: RemovableHandle) -> Watch | None:
    """Watch the model whose first step this is. None where the script watches itself.

    `place`: the hook of all optimizers from which it is called.
    """
    if endings.is_any_open():
        return None
    settings = Settings.from_environment()
    is_leader = rank() == 0
    sinks: list[Any] = [show] if is_leader else []
    run = getattr(sys.modules.get("wandb"), "run", None)
    if settings.wandb and is_leader:
        if run is None:
            print("update-watch: --wandb: the script has no W&B run open; none is written to", file=sys.stderr)
        else:
            from update_watch.dashboards import WandbSink

            sinks.append(WandbSink(run))
    leave_place(place)
    journal = free_path(Path(settings.journal)) if is_leader else None
    return watch(model_of(optimizer), optimizer, window=settings.window, sinks=sinks, journal=journal)


def rank() -> int:
    """Of this process, as torch or its launcher knows it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0") or 0)


def free_path(journal: Path) -> Path:
    """The journal, or one beside it where another process of the command keeps that."""
    return journal if not journal.exists() else journal.with_name(f"{journal.stem}-{os.getpid()}{journal.suffix}")


def model_of(optimizer: Optimizer) -> Any:
    """The module tree that holds what the optimizer steps, or masters of which it steps; else the tensors by place."""
    members = members_of(optimizer)
    ids = set(map(id, members))
    roots = owners.roots_of(owners.modules_with(members))
    if roots:
        return max(roots, key=lambda root: sum(id(p) in ids for p in root.parameters()))
    for root in sorted(owners.roots_of(owners.all_modules()), key=_size, reverse=True):
        pairs = named_tensors(root)
        if pairs and not masters.find(pairs, names_of(pairs), optimizer).is_empty:
            return root
    return [
        (f"group{g}.param{k}", param)
        for g, group in enumerate(optimizer.param_groups)
        for k, param in enumerate(group["params"])
    ]


def _size(module: torch.nn.Module) -> int:
    return sum(1 for _ in module.parameters())


def show(report: Report) -> None:
    """A line per window, above the script's progress bar."""
    line = f"update-watch, step {report.step:,}: {report.headline}"
    if sys.stderr.isatty():
        line = line[: max(shutil.get_terminal_size().columns - 1, 40)]
    begin = "\r\x1b[K" if sys.stderr.isatty() and "tqdm" not in sys.modules else ""  # over a bar of the script's own
    with above_progress_bars():
        sys.stderr.write(f"{begin}{line}\n")
