"""TRL's SFTTrainer with a tiny BF16 checkpoint; the cures of its table."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import datasets
import tokenizers
import torch
import transformers
import trl
from torch import Tensor

from tests.support.trainers.runs import DECAY, LR, STEPS, paste, same, tell, weights
from update_watch.callbacks.transformers import UpdateWatch

SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_checkpoint(folder: Path) -> None:
    words = tokenizers.models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0")
    options = {"eos_token": "w1", "pad_token": "w2"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **options)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, max_position_embeddings=32, **SIZES)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train(folder: Path, name: str, cure: str = "", watched: bool = True, **options: Any) -> dict[str, Tensor]:
    callback = UpdateWatch(window=STEPS, print_audit=False, journal=None, budget=None)
    torch.manual_seed(0)
    data = datasets.Dataset.from_dict({"input_ids": torch.randint(3, 64, (64, 17)).tolist()})
    settings = {
        **{"use_cpu": True, "max_steps": STEPS, "learning_rate": LR, "report_to": "none", "save_strategy": "no"},
        **{"lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "dataloader_pin_memory": False},
        **{"disable_tqdm": True, "gradient_checkpointing": False, **options},
    }
    arguments = functools.partial(trl.SFTConfig, **settings)
    low = arguments(str(folder / "out"), model_init_kwargs={"dtype": "bfloat16"}, bf16=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "checkpoint")
    assert model.dtype is torch.bfloat16
    first = weights(model)
    trainer = functools.partial(trl.SFTTrainer, train_dataset=data, callbacks=[callback] if watched else [])
    names = {"output_dir": str(folder / "out"), "SFTConfig": arguments, "SFTTrainer": trainer, "args": low}
    space = paste(cure, "trl", model=model, **names)
    if cure == "fused_decay":  # it has no say in the format of the weights
        space["args"].model_init_kwargs = {"dtype": "bfloat16"}
    run = space.get("trainer") or trainer(str(folder / "checkpoint"), space["args"])
    run.train()
    if watched:
        tell(name, callback.last, "trl", run.model, first)
    return weights(run.model)


if __name__ == "__main__":
    place = Path(sys.argv[1])
    write_checkpoint(place / "checkpoint")
    plain, watched = train(place, "plain", watched=False), train(place, "plain")
    print("SAME", same(plain, watched))
    for one in ("masters", "fp32_states", "kahan", "stochastic_rounding"):
        train(place, f"plain {one}", one)
    decay = {"learning_rate": DECAY["lr"], "weight_decay": DECAY["weight_decay"]}
    train(place, "decay", optim="adamw_torch", **decay)
    train(place, "decay fused_decay", "fused_decay", **decay)
