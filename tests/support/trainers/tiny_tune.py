"""What a configuration of torchtune names: a model, a tokenizer, data and a checkpointer, all tiny."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torchtune.models.llama2 import llama2


def model() -> nn.Module:
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "embed_dim": 32, "intermediate_dim": 32}
    return llama2(vocab_size=64, max_seq_len=32, **sizes)  # type: ignore[no-any-return]


class Tokenizer:
    pad_id = 0


class Data(torch.utils.data.Dataset[dict[str, list[int]]]):
    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokens = torch.randint(1, 64, (4 * 48, 17), generator=torch.Generator().manual_seed(0)).tolist()

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return {"tokens": self.tokens[index], "labels": self.tokens[index]}


class Checkpointer:
    def __init__(self, output: str, should_load_recipe_state: bool = False) -> None:
        self.output = output

    def load_checkpoint(self) -> dict[str, Any]:
        torch.manual_seed(0)
        return {"model": model().state_dict()}

    def save_checkpoint(self, state: dict[str, Any], **_: Any) -> None:
        torch.save(state["model"], self.output)


CONFIG = """
output_dir: .
model: {_component_: tests.support.trainers.tiny_tune.model}
tokenizer: {_component_: tests.support.trainers.tiny_tune.Tokenizer}
dataset: {_component_: tests.support.trainers.tiny_tune.Data}
checkpointer: {_component_: tests.support.trainers.tiny_tune.Checkpointer, output: trained.pt}
optimizer: {_component_: torch.optim.AdamW, lr: 1e-4}
loss: {_component_: torchtune.modules.loss.CEWithChunkedOutputLoss}
metric_logger: {_component_: torchtune.training.metric_logging.DiskLogger, log_dir: logs}
dtype: bf16
device: cpu
seed: 1
epochs: 1
batch_size: 4
shuffle: False
resume_from_checkpoint: False
max_steps_per_epoch: null
gradient_accumulation_steps: 1
optimizer_in_bwd: False
clip_grad_norm: null
compile: False
"""
