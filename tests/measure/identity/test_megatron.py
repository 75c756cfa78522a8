"""The real Megatron-core on two gloo processes. It asks for CUDA by name; on a copy of its source these names are replaced.

Runs where `megatron-core` is installed (`pip install --no-deps megatron-core`, and einops); it is no part of the test extras.
"""

from __future__ import annotations

import faulthandler
import hashlib
import importlib.util
import json
import re
import shutil
import socket
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn


def _source() -> Path | None:
    try:
        spec = importlib.util.find_spec("megatron.core")
    except ModuleNotFoundError:
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_source() is None, reason="megatron-core is not installed"),
]

STEPS, RANKS = 24, 2
Found = list[dict[str, Any]]
_CASES = {  # name -> is distributed, dtype
    "distributed": (True, torch.bfloat16),
    "distributed, FP32 model": (True, torch.float32),
    "float16": (False, torch.bfloat16),
}
_SHAPES = {"0.weight": [48, 32], "0.bias": [48], "2.weight": [48], "2.bias": [48], "3.weight": [16, 48], "3.bias": [16]}


def _copy_for_cpu(folder: Path) -> None:
    """Megatron-core, with the names of CUDA's devices and tensor types replaced where optimizers need them."""
    source = _source()
    assert source is not None
    core = folder / "megatron" / "core"
    shutil.copytree(source, core, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*core.glob("optimizer/*.py"), *core.glob("distributed/*.py"), core / "utils.py"):
        text = re.sub(r"torch\.cuda\.(Half|BFloat16|Float)Tensor", r"torch.\1Tensor", path.read_text())
        text = text.replace("torch.cuda.current_device()", "'cpu'")
        path.write_text(re.sub(r"device=(['\"])cuda\1", "device='cpu'", text))


def _train(name: str, is_watched: bool) -> dict[str, Any]:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer import TransformerConfig

    import update_watch as uw

    is_distributed, dtype = _CASES[name]
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.LayerNorm(48), nn.Linear(48, 16)).to(dtype)
    precision = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    model = DistributedDataParallel(
        TransformerConfig(num_layers=1, hidden_size=32, num_attention_heads=2, **precision),
        DistributedDataParallelConfig(use_distributed_optimizer=is_distributed, overlap_grad_reduce=False),
        net,
    )
    config = OptimizerConfig(
        optimizer="adam", lr=1e-3, weight_decay=0.1, use_distributed_optimizer=is_distributed, **precision
    )
    optimizer = get_megatron_optimizer(config, [model])
    reports: list[Any] = []
    options: dict[str, Any] = {"window": STEPS // 2, "sinks": [reports.append]}
    watch = uw.watch(model.module, optimizer, **options) if is_watched else None
    rng = torch.Generator().manual_seed(torch.distributed.get_rank())
    for _ in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        x = torch.randn(4, 32, generator=rng).to(dtype)
        (model(x) - x[:, :16]).float().square().mean().backward()
        model.finish_grad_sync()
        optimizer.step()
    if watch is not None:
        watch.close()
    final = hashlib.sha256()
    for p in model.parameters():
        final.update(p.detach().float().numpy().tobytes())
    return {"bits": final.hexdigest(), "reports": [report.to_dict() for report in reports]}


def _process(rank: int, folder: str, port: int) -> None:
    sys.path.insert(0, folder)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faulthandler.dump_traceback_later(300, exit=True)  # rather than hang
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(1, 1)
    found = {name: {"plain": _train(name, False), "watched": _train(name, True)} for name in _CASES}
    Path(folder, f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("megatron")
    _copy_for_cpu(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.start_processes(_process, (str(folder), port), nprocs=RANKS, start_method="spawn")  # type: ignore[attr-defined, no-untyped-call]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(RANKS)]


@pytest.mark.parametrize("name", _CASES)
def test_watching_megatron_leaves_training_as_it_is(found: Found, name: str) -> None:
    for rank in found:
        assert rank[name]["watched"]["bits"] == rank[name]["plain"]["bits"]


@pytest.mark.parametrize("name", _CASES)
def test_megatrons_fp32_masters_are_healthy_and_have_their_names(found: Found, name: str) -> None:
    first, second = (rank[name]["watched"]["reports"] for rank in found)
    assert [r["tensors"] for r in first] == [r["tensors"] for r in second]
    assert [(r["step"], r["window"]) for r in first] == [(STEPS // 2, STEPS // 2), (STEPS, STEPS // 2)]
    for report in first:
        assert {t["name"]: t["shape"] for t in report["tensors"]} == _SHAPES
        assert {(t["dtype"], t["health"]) for t in report["tensors"]} == {("float32", "healthy")}
        assert all(t["efficiency"] == pytest.approx(1, abs=1e-3) for t in report["tensors"])
