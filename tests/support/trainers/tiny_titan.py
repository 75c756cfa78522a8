"""A configuration for torchtitan (`--module tests.support.trainers.tiny_titan --config tiny`), and what it needs on a CPU."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# torchtitan takes a machine without accelerator for one with CUDA, and asks the device what a CPU does not tell
torch._utils._get_available_device_type = lambda: "cpu"  # type: ignore[assignment]
torch.cpu.device_count, torch.cpu.current_device = (lambda: 1), (lambda: 0)  # type: ignore[assignment]
_MEMORY = types.SimpleNamespace(total_memory=1 << 30)
_TOLD: dict[str, Any] = {"get_device_name": "cpu", "get_device_properties": _MEMORY, "memory_stats": {}}
for _name in (*_TOLD, "reset_peak_memory_stats", "empty_cache"):
    setattr(torch.cpu, _name, functools.partial(lambda told, *_: told, _TOLD.get(_name)))
torch.distributed.set_timeout = lambda *_: None  # type: ignore[attr-defined]  # of torch's nightly builds

from torchtitan.components.dataloader import BaseDataLoader  # noqa: E402
from torchtitan.components.loss import CrossEntropyLoss  # noqa: E402
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw  # noqa: E402
from torchtitan.components.tokenizer import BaseTokenizer  # noqa: E402
from torchtitan.config import TrainingConfig  # noqa: E402
from torchtitan.models.common.attention import ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3 import model_registry  # noqa: E402
from torchtitan.trainer import Trainer  # noqa: E402

from tests.support.trainers.runs import LR, STEPS  # noqa: E402


class Data(BaseDataLoader):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        pass

    def __init__(self, config: Any, *, seq_len: int, local_batch_size: int, **_: Any) -> None:
        self.shape = local_batch_size, seq_len + 1

    def __iter__(self) -> Iterator[tuple[dict[str, Tensor], Tensor]]:
        rng = torch.Generator().manual_seed(0)
        while True:
            tokens = torch.randint(0, 64, self.shape, generator=rng)
            yield {"input": tokens[:, :-1].contiguous()}, tokens[:, 1:].contiguous()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class Tokenizer(BaseTokenizer):
    @dataclass(kw_only=True, slots=True)
    class Config(BaseTokenizer.Config):
        pass

    def __init__(self, config: Any = None, **_: Any) -> None:
        super().__init__()

    def encode(self, *_: Any, **__: Any) -> list[int]:
        return []

    def decode(self, *_: Any, **__: Any) -> str:
        return ""

    def get_vocab_size(self) -> int:
        return 64


def tiny() -> Any:
    """llama3's debug model with one layer and attention that runs on a CPU; its FSDP2 over one process."""
    spec = model_registry("debugmodel")
    del spec.model.layers[1:]
    spec.model.layers[0].attention.inner_attention = ScaledDotProductAttention.Config()
    training = TrainingConfig(local_batch_size=2, seq_len=16, steps=STEPS, disable_cuda_graphs=True)
    return Trainer.Config(
        **{
            "loss": CrossEntropyLoss.Config(),
            "model_spec": spec,
            "optimizer": default_adamw(lr=2 * LR, weight_decay=0.0),
        },
        **{"lr_scheduler": LRSchedulersContainer.Config(warmup_steps=0, min_lr_factor=1.0), "training": training},
        **{"dataloader": Data.Config(), "tokenizer": Tokenizer.Config()},
    )


def decaying() -> Any:
    """Where weight decay is lost that is added in a rounding of its own."""
    config = tiny()
    config.optimizer = default_adamw(lr=1e-2, weight_decay=0.1)
    return config
