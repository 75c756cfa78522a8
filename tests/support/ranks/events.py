"""What can happen to ranks that are watched together: faults, ends, windows of their own. Run by name through `cases.launch`."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import time
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import update_watch as uw
from tests.support.ranks.cases import Case, Reports, ddp, fsdp2, hybrid, local, pipeline
from update_watch.ranks import gloo_group
from update_watch.ranks import joining as ranks


def _digest(model: nn.Module, optimizer: Any) -> str:
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    parts = [local(t.detach()).contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in tensors]
    return hashlib.sha256(b"".join([*parts, torch.get_rng_state().numpy().tobytes()])).hexdigest()


class Counting:
    """A process group that keeps the names of the collectives asked of it."""

    def __init__(self, group: Any, calls: list[str]) -> None:
        self._group, self._calls = group, calls

    def __getattr__(self, name: str) -> Any:
        self._calls.append(name)
        return getattr(self._group, name)


def is_identical(make: Callable[[], Case] | None = None) -> dict[str, Any]:
    """24 steps, of FSDP2 if not told otherwise, watched with windows of 4 steps and not."""
    calls: list[str] = []
    gloo = dist.ProcessGroupGloo
    with mock.patch.object(dist, "ProcessGroupGloo", lambda *arguments: Counting(gloo(*arguments), calls)):
        return {**_is_identical(make or (lambda: fsdp2(24, 41, 16))), "calls": calls}


def hybrid_is_identical() -> dict[str, Any]:
    return is_identical(hybrid)


def _is_identical(make: Callable[[], Case]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for watched in (False, True):
        case = make()
        start = _digest(case.model, case.optimizer)
        watch = uw.watch(case.model, case.optimizer, window=4, check_replicas=True, budget=None) if watched else None
        for x in case.batches(24):
            case.backward(x)
            case.optimizer.step()
        found["watched" if watched else "unwatched"] = _digest(case.model, case.optimizer)
        found["moved"] = found["unwatched"] != start
        if watch is not None:
            watch.flush()
            found["collectives"], found["joined"] = watch._ranks.collectives, watch._ranks.joined
            watch.close()
    return found


def fails_in_a_hook() -> dict[str, Any]:
    """Rank 1's watch raises in its 20th step; windows of 8, 40 steps."""
    case = fsdp2(48, 64, 40)
    reports = Reports()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports], budget=None)
        started, steps = time.monotonic(), 0
        for x in case.batches(40):
            case.backward(x)
            if dist.get_rank() == 1 and steps == 19:
                _plant("before", watch)
            case.optimizer.step()
            steps += 1
        watch.flush()
        seconds = time.monotonic() - started
        watch.close()
    texts = [str(w.message) for w in caught if "update-watch" in str(w.message)]
    return {
        "joined": watch._ranks.joined,
        "steps": steps,
        "reports": len(reports),
        "seconds": seconds,
        "warnings": texts,
    }


def drifts(make: Callable[[], Case] | None = None) -> dict[str, Any]:
    """Windows of 8; after 12 steps the last rank alone writes to one tensor."""
    case = ddp() if make is None else make()
    reports = Reports()
    sinks = [reports, (told := []).append]  # the second as anybody would give it
    watch = uw.watch(case.named, case.optimizer, window=8, sinks=sinks, check_replicas=True, budget=None)
    for steps, x in enumerate(case.batches(24), 1):
        case.backward(x)
        case.optimizer.step()
        if steps == 12 and dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                local(case.named[2][1]).mul_(1.25)
    watch.flush()
    watch.close()
    broken = [{t.name: str(t.cause) for t in r.tensors if t.health == "broken"} for r in reports]
    return {
        "broken": broken,
        "told": len(told),
        "alerts": [a.text for r in reports for a in r.alerts if "differ" in a.text],
    }


def hybrid_drifts() -> dict[str, Any]:
    return drifts(hybrid)


PLACES = ("read", "before", "encode", "after", "close_window", "catalogue", "judge")


def fails_at(place: str, rank: int, step: int) -> dict[str, Any]:
    """`rank` raises in our code in or after `step`, at one of PLACES; windows of 4, 24 steps of FSDP2."""
    case = fsdp2(24, 40, 16)
    watch = uw.watch(case.model, case.optimizer, window=4, budget=None)
    started, steps = time.monotonic(), 0
    logger = logging.getLogger("update_watch")
    logger.disabled = True
    with warnings.catch_warnings(), mock.patch.object(ranks, "catalogue", ranks.catalogue):
        warnings.simplefilter("ignore")
        for x in case.batches(24):
            case.backward(x)
            if steps == step and dist.get_rank() == rank:
                _plant(place, watch)
            case.optimizer.step()
            steps += 1
        watch.flush()
        seconds = time.monotonic() - started
        watch.close()
    logger.disabled = False
    return {"seconds": seconds, "steps": steps, "joining": watch._ranks.is_joining, "joined": watch._ranks.joined}


def _plant(place: str, watch: Any) -> None:
    def planted(*_: Any, **__: Any) -> Any:
        raise RuntimeError("planted")

    (watched,) = watch._model.watched.values()
    if place in ("before", "after", "close_window"):
        setattr(watched, place, planted)
    elif place == "read":
        read = watch._judge._handle
        watch._judge._handle = lambda window: read(
            dataclasses.replace(window, cohorts=(None,)) if hasattr(window, "cohorts") else window
        )
    elif place == "catalogue":
        ranks.catalogue = planted  # of the mock above
    elif place == "encode":
        watch._ranks._plan.encode = planted
    else:
        watch._diagnosis.judge = planted


def fail_anywhere(runs: int) -> list[dict[str, Any]]:
    """The first places once, at either rank in turn."""
    return [fails_at(place, i % 2, 5 + i) for i, place in enumerate(PLACES[:runs])]


def many_faults(runs: int) -> list[dict[str, Any]]:
    """Runs with faults at changing places, ranks and steps."""
    return [fails_at(PLACES[i % len(PLACES)], (i // 3) % dist.get_world_size(), i % 23) for i in range(runs)]


def one_closes_alone() -> dict[str, Any]:
    """After 12 steps rank 0 closes its watch; windows of 8, 24 steps. Rank 1 closes at the end."""
    case = fsdp2(24, 41, 16)
    reports = Reports()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports], budget=None)
        told = 0
        for steps, x in enumerate(case.batches(24), 1):
            case.backward(x)
            case.optimizer.step()
            if steps == 12 and dist.get_rank() == 0:
                watch.close(4.0)
                told = len(reports)
        started = time.monotonic()
        watch.flush()
        seconds = time.monotonic() - started
        watch.close()
    texts = [str(w.message) for w in caught if "update-watch" in str(w.message)]
    return {"windows": [[r.window, r.step] for r in reports], "seconds": seconds, "told": told, "warnings": texts}


def whole_rules() -> dict[str, str]:
    """A rule that needs the whole tensor, on shards and on a tensor that is whole here."""
    net = nn.ModuleList([nn.Linear(24, 40, bias=False), nn.Linear(24, 16, bias=False)]).bfloat16()
    fully_shard(net[0], mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    watch = uw.watch(net, torch.optim.Muon(net.parameters(), lr=1e-3), window=4, budget=None)
    (watched,) = watch._model.watched.values()
    reasons = {row.names[0]: row.reason for row in watched.rows}
    watch.close()
    return reasons


def one_watches_late() -> dict[str, Any]:
    """Rank 0 watches from the start, rank 1 only when rank 0 has given up waiting; windows of 8, 32 steps."""
    case = fsdp2(24, 41, 16)
    reports = Reports()
    watch = None
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(gloo_group, "MEET", 0.5):
        warnings.simplefilter("always")
        if dist.get_rank() == 0:
            watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports], budget=None)
        for steps, x in enumerate(case.batches(32), 1):
            case.backward(x)
            case.optimizer.step()
            if steps == 16:
                if watch is not None:
                    watch.flush()
                dist.barrier()
                started = time.monotonic()
                watch = watch or uw.watch(case.model, case.optimizer, window=8, sinks=[reports], budget=None)
        assert watch is not None
        watch.flush()
        seconds = time.monotonic() - started
        watch.close()
    texts = [str(w.message) for w in caught if "update-watch" in str(w.message)]
    return {"reports": len(reports), "warnings": texts, "seconds": seconds, "collectives": watch._ranks.collectives}


def ends_without_closing() -> dict[str, Any]:
    """A window ends with the last step, and nobody waits for it."""
    case = fsdp2(24, 40, 16)
    uw.watch(case.model, case.optimizer, window=4, budget=None)
    for x in case.batches(24):
        case.backward(x)
        case.optimizer.step()
    return {}


def one_dies() -> dict[str, Any]:
    """The last rank is gone in mid-window, after 12 steps; windows of 8, 32 steps of a model on each rank."""
    case = pipeline()
    reports = Reports()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.named, case.optimizer, window=8, sinks=[reports], budget=None)
        started = time.monotonic()
        for steps, x in enumerate(case.batches(32), 1):
            case.backward(x)
            case.optimizer.step()
            if steps == 8:
                watch._settle(None)
            if steps == 12 and dist.get_rank() == dist.get_world_size() - 1:
                os._exit(0)
        watch.flush()
        watch.close()
        seconds = time.monotonic() - started
    return {
        "windows": [[r.window, r.step] for r in reports],
        "tensors": [len(r.tensors) for r in reports],
        "seconds": seconds,
        "warnings": [str(w.message) for w in caught if "update-watch" in str(w.message)],
        "joined": watch._ranks.joined,
    }


def one_flushes_alone() -> dict[str, Any]:
    """Windows of 8; after 11 steps rank 0 alone closes one, and at 16 both."""
    case = ddp()
    reports = Reports()
    watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports], budget=None)
    for steps, x in enumerate(case.batches(24), 1):
        case.backward(x)
        case.optimizer.step()
        if steps == 11 and dist.get_rank() == 0:
            watch._close_window()
        if steps == 16 and dist.get_rank() == 0:
            watch._close_window()
    watch.flush()
    watch.close()
    windows = [[r.window, r.step] for r in reports]
    return {"windows": windows, "measured": reports[-1].to_dict()["tensors"], "joined": watch._ranks.joined}
