"""Training on several gloo processes, watched, next to a full FP64 comparison of every rank's elements.

Run by tests/ranks/ through `launch`: one start of the processes for many cases.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import multiprocessing
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

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

sys.path.insert(0, str(Path(__file__).parents[3]))

import update_watch as uw
from bench.shared.exact_rules import adamw

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


class Reports(list[Any]):
    """A sink that is called on every rank."""

    on_every_rank = True
    __call__ = list.append


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
    owner = importlib.import_module(f"tests.support.ranks.{module or 'events'}")
    return getattr(owner, function)(*([int(argument) if argument.isdigit() else argument] if argument else []))


def _process(rank: int, size: int, names: list[str], folder: str, limit: int, environment: dict[str, str]) -> None:
    os.environ.update(environment)  # the process that this one is forked from has that of its start
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
    # forked from one process that has loaded torch, and has no threads: each would take seconds to load it anew
    multiprocessing.set_forkserver_preload([__name__, "torch._dynamo"])
    given = size, names, str(folder), limit, dict(os.environ)
    mp.start_processes(_process, given, nprocs=size, start_method="forkserver")
    paths = [folder / f"{rank}.json" for rank in range(size)]
    return [json.loads(path.read_text()) for path in paths if path.exists()]  # one that died left nothing
