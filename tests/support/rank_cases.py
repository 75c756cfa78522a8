"""Training on several gloo processes, watched, next to a full FP64 comparison of every rank's elements.

Run by tests/test_ranks*.py through `launch`: one start of the processes for many cases.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import hashlib
import importlib
import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).parents[2]))

import update_watch as uw
from bench.shared.exact_rules import adamw
from update_watch.ranks import gloo_group
from update_watch.ranks import joining as ranks

STEPS = 48
LR = 1e-3  # a part of the updates is lost
SAMPLES = 32  # 256 per tensor of so small a model: a part of most shards. The default would read them whole


class Net(nn.Module):
    """In BF16. `sizes`: of the layers."""

    def __init__(self, *sizes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
        self.layers = nn.ModuleList(layers)
        self.to(torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        out: Tensor = self.layers[-1](x)
        return out


def local(tensor: Tensor) -> Tensor:
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


class Case:
    """One watched training of `STEPS` steps and its truth."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        inputs: int,
        named: list[tuple[str, Tensor]] | None = None,
        same_data: bool = False,
        lr: float = LR,
    ) -> None:
        self.model, self.optimizer, self.inputs, self.same_data = model, optimizer, inputs, same_data
        self.named = list(model.named_parameters()) if named is None else named
        self.lr = lr

    def batches(self, count: int, seed: int = 0) -> Iterator[Tensor]:
        rng = torch.Generator().manual_seed(seed if self.same_data else 1000 * dist.get_rank() + seed)
        for _ in range(count):
            yield torch.randn(8, self.inputs, generator=rng).to(torch.bfloat16)

    def backward(self, x: Tensor) -> None:
        self.optimizer.zero_grad()
        self.model(x).float().pow(2).mean().backward()

    def run(self, warm: int = 4) -> dict[str, Any]:
        """Names -> efficiency and lost fraction, found and true; and what the watch said of itself."""
        for x in self.batches(warm, seed=1):
            self.backward(x)
            self.optimizer.step()
        watch = uw.watch(self.named, self.optimizer, window=STEPS, samples=SAMPLES, check_replicas=True, budget=None)
        truth = watched_truth(self, STEPS)
        report = watch.flush()
        assert report is not None
        found = {
            "rank": dist.get_rank(),
            "report": report.to_dict(),
            "truth": truth,
            "collectives": watch._ranks.collectives,
            "joined": watch._ranks.joined,
            "weights": sum(float(local(p).double().abs().sum()) for p in (q.detach() for _, q in self.named)),
        }
        watch.close()
        return found


def watched_truth(case: Case, steps: int, seed: int = 0) -> dict[str, list[float]]:
    """Train; name -> efficiency and lost fraction over all elements of all ranks, in FP64."""
    stepping = getattr(case.optimizer, "optim", case.optimizer)  # ZeRO holds an optimizer of its shard
    named = dict(case.named)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in named}
    group = case.optimizer.param_groups[0]
    for x in case.batches(steps, seed):
        case.backward(x)
        before, intended = {}, {}
        held = {id(p) for g in stepping.param_groups for p in g["params"]}
        for name, p in named.items():
            if id(p) in held and p.grad is not None:
                state = {k: local(v) if isinstance(v, Tensor) else v for k, v in stepping.state[p].items()}
                before[name] = local(p.detach()).double().clone()
                intended[name] = adamw(before[name], local(p.grad).double(), state, group)
        case.optimizer.step()
        for name, d in intended.items():
            a = local(named[name].detach()).double() - before[name]
            lost = (d != 0) & (a == 0)
            sums[name] += torch.stack([(a * d).sum(), (d * d).sum(), (d != 0).sum(), lost.sum()])
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, {k: v.tolist() for k, v in sums.items()})
    total: dict[str, list[float]] = {}
    for rank in everywhere:
        for name, values in rank.items():
            total[name] = [a + b for a, b in zip(total.get(name, [0.0] * 4), values, strict=True)]
    return {name: [v[0] / v[1], v[3] / v[2]] for name, v in total.items() if v[1]}


def _clean(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name.replace("_fsdp_wrapped_module.", ""), p) for name, p in model.named_parameters())


def _adamw(model: nn.Module, lr: float = LR) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def ddp() -> Case:
    net = Net(48, 64, 40)
    model = DistributedDataParallel(net)
    return Case(model, _adamw(model), 48, list(net.named_parameters()))


def fsdp2(*sizes: int) -> Case:
    net = Net(*sizes)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    return Case(net, _adamw(net), sizes[0])


def fsdp2_even() -> Case:
    return fsdp2(48, 64, 40)


def fsdp2_uneven() -> Case:
    return fsdp2(96, 5, 97, 33)


def fsdp2_empty() -> Case:
    return fsdp2(600, 1, 65, 1)


def fsdp1() -> Case:
    net = Net(48, 64, 40)
    model = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
    return Case(model, _adamw(model), 48, [(n, p) for n, p in _clean(model)])


def tensor_parallel() -> Case:
    net = Net(48, 64, 40)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    parallelize_module(net, mesh, {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()})
    return Case(net, _adamw(net), 48, same_data=True)


def hybrid() -> Case:
    net = Net(48, 61, 40)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("replicate", "shard"))
    fully_shard(net, mesh=mesh)
    return Case(net, _adamw(net), 48)


def two_dimensional() -> Case:
    net = Net(48, 62, 40)
    mesh = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(net, mesh["tensor"], {"layers.0": ColwiseParallel(), "layers.1": RowwiseParallel()})
    fully_shard(net, mesh=mesh["data"])
    return Case(net, _adamw(net), 48, same_data=True)


def zero1() -> Case:
    net = Net(48, 64, 40, 32)
    model = DistributedDataParallel(net)
    optimizer = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=LR)
    return Case(model, optimizer, 48, list(net.named_parameters()))


def pipeline() -> Case:
    """Each rank has other parameters."""
    rank = dist.get_rank()
    net = Net(48 + rank, 64, 40)
    return Case(
        net, _adamw(net, LR * 4**-rank), 48 + rank, [(f"stage{rank}.{n}", p) for n, p in net.named_parameters()]
    )


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
    reports: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports.append], budget=None)
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
    reports: list[Any] = []
    watch = uw.watch(case.named, case.optimizer, window=8, sinks=[reports.append], check_replicas=True, budget=None)
    for steps, x in enumerate(case.batches(24), 1):
        case.backward(x)
        case.optimizer.step()
        if steps == 12 and dist.get_rank() == dist.get_world_size() - 1:
            with torch.no_grad():
                local(case.named[2][1]).mul_(1.25)
    watch.flush()
    watch.close()
    broken = [{t.name: str(t.cause) for t in r.tensors if t.health == "broken"} for r in reports]
    return {"broken": broken, "alerts": [a.text for r in reports for a in r.alerts if "differ" in a.text]}


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
    reports: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports.append], budget=None)
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
    reports: list[Any] = []
    watch = None
    with warnings.catch_warnings(record=True) as caught, mock.patch.object(gloo_group, "MEET", 0.5):
        warnings.simplefilter("always")
        if dist.get_rank() == 0:
            watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports.append], budget=None)
        for steps, x in enumerate(case.batches(32), 1):
            case.backward(x)
            case.optimizer.step()
            if steps == 16:
                if watch is not None:
                    watch.flush()
                dist.barrier()
                started = time.monotonic()
                watch = watch or uw.watch(case.model, case.optimizer, window=8, sinks=[reports.append], budget=None)
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
    reports: list[Any] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        watch = uw.watch(case.named, case.optimizer, window=8, sinks=[reports.append], budget=None)
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
    reports: list[Any] = []
    watch = uw.watch(case.model, case.optimizer, window=8, sinks=[reports.append], budget=None)
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


CASES: dict[str, Callable[[], Case]] = {
    case.__name__: case
    for case in (
        *(ddp, fsdp2_even, fsdp2_uneven, fsdp2_empty, fsdp1),
        *(tensor_parallel, hybrid, two_dimensional, zero1, pipeline),
    )
}


def _run(name: str) -> Any:
    if name in CASES:
        return CASES[name]().run()
    function, _, argument = name.partition(":")
    module, _, function = function.rpartition(".")
    owner = importlib.import_module(f"tests.support.{module}") if module else sys.modules[__name__]
    return getattr(owner, function)(*([int(argument) if argument.isdigit() else argument] if argument else []))


def _process(rank: int, size: int, names: list[str], folder: str, limit: int) -> None:
    torch.set_num_threads(1)
    faulthandler.dump_traceback_later(limit, exit=True)  # rather than hang
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size, timeout=timedelta(seconds=20)
    )
    found = {}
    for name in names:
        try:
            found[name] = _run(name)
        except Exception:
            print(f"rank {rank}, {name}:", traceback.format_exc(), file=sys.stderr, flush=True)
            raise
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def launch(size: int, names: list[str], folder: Path, limit: int = 300) -> list[dict[str, Any]]:
    """Run the cases in `size` processes, for at most `limit` seconds; what each rank found."""
    mp.start_processes(_process, (size, names, str(folder), limit), nprocs=size, start_method="spawn")
    paths = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]  # one that died left nothing
