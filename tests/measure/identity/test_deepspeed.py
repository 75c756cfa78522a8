"""The real DeepSpeed on two gloo processes: its partitions by parameter, against what DeepSpeed itself gives out of them.

Runs where `deepspeed` is installed (it is no part of the test extras: `DS_BUILD_OPS=0 pip install --no-deps deepspeed`,
and py-cpuinfo, hjson, ninja, einops, msgpack, pydantic, psutil, tqdm).
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib.util
import json
import os
import socket
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

STEPS, RANKS = 24, 2
_LR = 2e-2  # of the comparison
Found = list[dict[str, Any]]
_SHORT = {"enabled": True, "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
_CASES: dict[str, dict[str, Any]] = {
    "stage 1": {"zero_optimization": {"stage": 1}},
    "stage 2": {"zero_optimization": {"stage": 2}},
    "stage 3": {"zero_optimization": {"stage": 3, "sub_group_size": 700}},
    "bf16 optimizer": {"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}},
    "stage 2, BF16 masters": {"zero_optimization": {"stage": 2}, "bf16": _SHORT},
    "stage 3, BF16 masters": {"zero_optimization": {"stage": 3}, "bf16": _SHORT},
    "offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
}
_SHAPES = {"0.weight": [48, 32], "0.bias": [48], "2.weight": [48], "2.bias": [48], "3.weight": [16, 48], "3.bias": [16]}


def _engine(name: str, is_compared: bool) -> Any:
    import deepspeed
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 16))
    groups: list[dict[str, Any]] = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    rule = DeepSpeedCPUAdam if name == "offload" else torch.optim.AdamW
    lr = 1e-3
    if is_compared:  # states cannot be had from DeepSpeed where there are several groups
        rule, lr = torch.optim.SGD, _LR
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "zero_allow_untested_optimizer": True,
        "gradient_clipping": 0.0 if is_compared else 1.0,
        **_CASES[name],
    }
    return deepspeed.initialize(model=model, optimizer=rule(groups, lr=lr), config=config)[0]


def _train(name: str, is_watched: bool, is_compared: bool = False) -> dict[str, Any]:
    import update_watch as uw

    engine = _engine(name, is_compared)
    reports: list[Any] = []
    watch = None
    if is_watched:
        watch = uw.watch(
            engine.module, engine.optimizer, window=STEPS // 2, sinks=[reports.append], check_replicas=True
        )
    sums: dict[str, list[float]] = {}
    rng = torch.Generator().manual_seed(engine.global_rank)
    for step in range(STEPS):
        x = torch.randn(4, 32, generator=rng).bfloat16()
        engine.backward((engine(x) - x[:, :16]).float().square().mean())
        compares = is_compared and step >= STEPS // 2  # the last window
        before, grads = (_full("param", engine), _full("grad", engine)) if compares else ({}, {})
        engine.step()
        if compares:
            _compare(before, grads, _full("param", engine), sums)
    if watch is not None:
        watch.close()
    final = hashlib.sha256()
    for _, p in engine.module.named_parameters():
        final.update(_get("param", p).float().numpy().tobytes())
    engine.destroy()
    return {
        "bits": final.hexdigest(),
        "reports": [report.to_dict() for report in reports],
        "truth": {n: dot / want for n, (dot, want) in sums.items()},
    }


def _get(what: str, param: Any) -> Any:
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    return (safe_get_full_fp32_param if what == "param" else safe_get_full_grad)(param)


def _full(what: str, engine: Any) -> dict[str, Any]:
    """Whole parameters or gradients, out of the partitions of all ranks."""
    return {name: _get(what, p).double() for name, p in engine.module.named_parameters()}


def _compare(
    before: dict[str, Any], grads: dict[str, Any], after: dict[str, Any], sums: dict[str, list[float]]
) -> None:
    """SGD in FP64, from what is stored."""
    for name in _SHAPES:
        weight = before[name]
        intended = -_LR * (grads[name] + (0.1 if weight.dim() > 1 else 0.0) * weight)
        applied = after[name] - weight
        both = sums.setdefault(name, [0.0, 0.0])
        both[0] += float((applied * intended).sum())
        both[1] += float((intended * intended).sum())


def _process(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(300, exit=True)  # rather than hang
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    os.environ.update(place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_SIZE=str(RANKS))
    import deepspeed

    deepspeed.init_distributed("gloo")
    found: dict[str, Any] = {}
    for name in _CASES:
        if name == "offload":
            try:
                deepspeed.ops.op_builder.CPUAdamBuilder().load()
            except Exception as error:  # noqa: BLE001  no compiler
                found[name] = {"problem": repr(error)}
                continue
        found[name] = {"plain": _train(name, False), "watched": _train(name, True)}
        if "masters" in name:
            found[name]["compared"] = _train(name, True, is_compared=True)
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("deepspeed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (str(folder), port), nprocs=RANKS, start_method="spawn")
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


def _case(found: Found, name: str) -> Found:
    if "problem" in found[0][name]:
        pytest.skip(f"DeepSpeed cannot build its CPU Adam here: {found[0][name]['problem']}")
    return [rank[name] for rank in found]


@pytest.mark.parametrize("name", _CASES)
def test_watching_deepspeed_leaves_training_as_it_is(found: Found, name: str) -> None:
    for rank in _case(found, name):
        assert rank["watched"]["bits"] == rank["plain"]["bits"]


@pytest.mark.parametrize("name", _CASES)
def test_every_rank_reports_every_parameter_by_name(found: Found, name: str) -> None:
    first, second = (rank["watched"]["reports"] for rank in _case(found, name))
    assert [r["tensors"] for r in first] == [r["tensors"] for r in second]
    assert [(r["step"], r["window"]) for r in first] == [(STEPS // 2, STEPS // 2), (STEPS, STEPS // 2)]
    dtype = "bfloat16" if "masters" in name else "float32"
    for report in first:
        assert {t["name"]: t["shape"] for t in report["tensors"]} == _SHAPES
        assert {t["dtype"] for t in report["tensors"]} == {dtype}
        groups = {t["optimizer_group"] for t in report["tensors"] if len(t["shape"]) > 1}
        assert groups == {"0/0"}


@pytest.mark.parametrize("name", [name for name in _CASES if "masters" not in name and name != "offload"])
def test_fp32_partitions_are_healthy(found: Found, name: str) -> None:
    (first, _) = _case(found, name)
    for report in first["watched"]["reports"]:
        assert {t["health"] for t in report["tensors"]} == {"healthy"}
        assert all(t["efficiency"] == pytest.approx(1, abs=1e-3) for t in report["tensors"])


@pytest.mark.parametrize("name", [name for name in _CASES if "masters" in name])
def test_what_bf16_partitions_lose_is_told_by_parameter(found: Found, name: str) -> None:
    for rank in _case(found, name):
        report, truth = rank["compared"]["reports"][-1], rank["compared"]["truth"]
        for t in report["tensors"]:
            assert t["efficiency"] == pytest.approx(truth[t["name"]], abs=0.03), t["name"]
        assert {t["name"]: t["health"] for t in report["tensors"]}["2.weight"] == "stalled"


def test_deepspeeds_cpu_adam_is_unknown_and_not_copied(found: Found) -> None:
    """Its C++ state is freed by name when a copy ends: the process would crash in the next step."""
    (first, _) = _case(found, "offload")
    for t in first["watched"]["reports"][-1]["tensors"]:
        assert (t["health"], "finalizer" in t["advice"]) == ("unknown", True)
