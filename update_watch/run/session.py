"""In a process of the command: the watch that nobody called for."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from update_watch import endings
from update_watch.measure.device.streams import is_capturing
from update_watch.measure.hooks.process_place import PLACE
from update_watch.measure.identity import masters, owners
from update_watch.measure.identity.names import members_of, named_tensors, names_of
from update_watch.report import SEVERITY, Report
from update_watch.run import claims
from update_watch.run.settings import Settings
from update_watch.watch import Watch, watch
from update_watch.wording import above_progress_bars, percent, plural

_BEGINNING = threading.RLock()
_models: list[tuple[str, Callable[[], Any]]] = []  # that are watched, with their names
_met: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def begin(optimizer: Optimizer, place: RemovableHandle) -> None:
    """Watch the model whose first step this is, and those that come later; nothing where the script watches itself.

    `place`: the hook of all optimizers from which it is called.
    """
    PLACE.take(place)
    if not endings.is_any_open():
        _watch(model_of(optimizer), optimizer)
        PLACE.last = torch.compiler.disable(_follow)  # type: ignore[no-untyped-call]  # torch's


def _follow(optimizer: Optimizer, *_: Any) -> None:
    """Before a step, behind the open watches: one that none has taken may train a model of its own, as a critic has one."""
    if optimizer in _met or is_capturing():
        return
    with _BEGINNING:  # two threads may each train a model
        if optimizer in _met:
            return
        _met.add(optimizer)
        try:
            if not endings.is_watched(optimizer):
                model = model_of(optimizer)
                if isinstance(model, torch.nn.Module) and not any(known() is model for _, known in _models):
                    _watch(model, optimizer)
        except Exception as error:
            print(f"update-watch: a model of this process is not watched: {error!r}", file=sys.stderr)


def _watch(model: Any, optimizer: Optimizer) -> Watch:
    settings = Settings.from_environment()
    is_leader, is_first = rank() == 0, not _models
    name = _name_for(model)
    _models.append((name, weakref.ref(model) if isinstance(model, torch.nn.Module) else _nothing))
    sinks: list[Any] = [functools.partial(show, name)] if is_leader else []
    run = None
    if settings.wandb and is_leader:
        if importlib.util.find_spec("wandb") is None:
            print("update-watch: --wandb: there is no wandb where the script runs; nothing is logged", file=sys.stderr)
        elif not is_first:
            print(f"update-watch: --wandb: the run holds the first model; {name} is in its journal", file=sys.stderr)
        else:
            from update_watch.dashboards import WandbSink

            run = getattr(sys.modules.get("wandb"), "run", None)
            # None, of a run that is still to come: the one that is open when a window ends
            sinks.append(WandbSink(run))
    journal = None
    if is_leader:
        journal = free_path(Path(settings.journal), "" if is_first else name)
        claims.note(settings.claims, journal)
    found = watch(model, optimizer, window=settings.window, sinks=sinks, journal=journal)
    found.name = name
    endings.OF_COMMAND.add(found)
    if run is not None:
        _finish_with(run, found)
    return found


def _finish_with(run: Any, found: Watch) -> None:
    """Report the open window when the script finishes its W&B run: nobody closes the watch before it."""
    held = weakref.ref(found)

    def report() -> None:
        open_watch = held()
        if open_watch is not None and not _has_ranks():  # they end their windows together, and have not all a run
            open_watch.flush(endings.WAIT)

    try:
        from wandb.sdk.wandb_run import TeardownHook, TeardownStage

        run._teardown_hooks.append(TeardownHook(report, TeardownStage.EARLY))
    except Exception:  # there is no public way: the sink says what it could not log
        pass


def _has_ranks() -> bool:
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _after_fork() -> None:
    """What this process trains is another training than its parent's: it is watched anew."""
    global _BEGINNING
    _BEGINNING = threading.RLock()
    _models.clear()
    _met.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _name_for(model: Any) -> str:
    """Of its class, and a number where it is not the first of that."""
    name = type(model).__name__
    count = sum(known.rstrip("0123456789") == name for known, _ in _models)
    return f"{name}{count + 1}" if count else name


def _nothing() -> None:
    """A model that is no module."""


def rank() -> int:
    """Of this process, as torch or its launcher knows it."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0") or 0)


def free_path(journal: Path, name: str = "") -> Path:
    """The journal, or one beside it: for a further model of this `name`, and where another process of the command keeps it.

    It is made at once, empty: processes that begin together would all find it free.
    """
    path = journal.with_name(f"{journal.stem}-{name}{journal.suffix}") if name else journal
    beside = path.with_name(f"{path.stem}-{os.getpid()}{path.suffix}")
    try:
        path.open("x").close()
    except FileExistsError:
        return beside
    except OSError:  # of a folder that cannot be written to the journal itself warns
        pass
    return path


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


def brief(report: Report) -> str:
    """A window in a few words: alerts say the rest when something changes, and the headline ends the run."""
    counts = ", ".join(f"{n:,} {health}" for health in SEVERITY if (n := report.counts[health.value]))
    words = f"{counts} of {plural(len(report.tensors), 'tensor')}"
    return (
        words
        if report.efficiency is None
        else f"{words}; {percent(max(0.0, report.efficiency))} of the updates arrived"
    )


def show(name: str, report: Report) -> None:
    """A line per window, above the script's progress bar; of several models with the `name` of its own."""
    of = f" of {name}" if len(_models) > 1 else ""
    line = f"update-watch, step {report.step:,}{of}: {brief(report)}"
    if sys.stderr.isatty():
        line = line[: max(shutil.get_terminal_size().columns - 1, 40)]
    begin = "\r\x1b[K" if sys.stderr.isatty() and "tqdm" not in sys.modules else ""  # over a bar of the script's own
    with above_progress_bars():
        sys.stderr.write(f"{begin}{line}\n")
