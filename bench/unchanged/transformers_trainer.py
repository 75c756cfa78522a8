"""A small Llama from its config, trained by Transformers' Trainer."""

import sys

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

out, *how = sys.argv[1:]
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
model = LlamaForCausalLM(config)
if "bf16" in how:
    model.to(torch.bfloat16)
data = open(torch.__file__, "rb").read()[: 32 * 512]
rows = [{"input_ids": list(data[i : i + 32]), "labels": list(data[i : i + 32])} for i in range(0, len(data), 32)]
arguments = TrainingArguments(
    f"{out}.run",
    max_steps=64,
    learning_rate=1e-4,
    warmup_steps=8,
    lr_scheduler_type="cosine",
    per_device_train_batch_size=4,
    use_cpu=True,
    report_to="none",
    save_strategy="no",
    dataloader_pin_memory=False,
)
callbacks = []
if "given" in how:
    from update_watch.callbacks import UpdateWatch

    callbacks = [UpdateWatch(window=16, journal=f"{out}.jsonl")]
Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
torch.save({"model": model.state_dict(), "drawn": torch.rand(4)}, out)
