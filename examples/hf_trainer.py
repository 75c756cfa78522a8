"""Hugging Face's Trainer: one line, `callbacks=[UpdateWatch()]`.

    python examples/hf_trainer.py

A small Llama with random weights in bfloat16, which is how Transformers 5 loads most checkpoints by default:
`from_pretrained(...)` keeps the dtype of the file. Fine-tuned so, small updates are rounded away.
"""

import sys
import tempfile
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from update_watch.callbacks.transformers import UpdateWatch


def main(dtype: str = "bfloat16", steps: str = "64") -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).to(getattr(torch, dtype))
    tokens = torch.randint(0, 256, (64, 33)).tolist()
    data: Any = [{"input_ids": row, "labels": row} for row in tokens]
    watch = UpdateWatch(window=32)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=int(steps),
            learning_rate=2e-5,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            dataloader_pin_memory=False,
            logging_steps=32,
        )
        Trainer(model, arguments, train_dataset=data, callbacks=[watch]).train()
    assert watch.last is not None
    print(watch.last.headline)


if __name__ == "__main__":
    main(*sys.argv[1:])
