"""litgpt's own `litgpt.pretrain.setup` on a Llama of two layers (`pip install --no-deps litgpt==0.5.13`)."""

import inspect
import sys
from pathlib import Path

import torch
from litgpt import pretrain
from litgpt.args import EvalArgs, LogArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import DataModule

out, *how = sys.argv[1:]
sys.argv = ["pretrain", "tiny-llama-1.1b"]  # it writes them beside the checkpoint


class Text(DataModule):
    def connect(self, tokenizer=None, batch_size: int = 1, max_seq_length: int | None = None) -> None:
        self.batch_size, self.length = batch_size, (max_seq_length or 32) + 1

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        data = torch.tensor(list(open(torch.__file__, "rb").read()[:50_000]), dtype=torch.long)
        rows = data[: len(data) // self.length * self.length].reshape(-1, self.length)
        return torch.utils.data.DataLoader(rows, self.batch_size, shuffle=True)

    val_dataloader = train_dataloader


torch.compiler.set_stance("force_eager")  # its torch.compile(model) takes a minute; nanogpt.py compiles
if "given" in how:  # the one line that one would add
    source, line = inspect.getsource(pretrain), "    optimizer = fabric.setup_optimizers(optimizer)\n"
    assert source.count(line) == 1
    watched = f"    import update_watch as uw; uw.watch(model, optimizer, window=16, journal={out + '.jsonl'!r})\n"
    exec(compile(source.replace(line, line + watched), pretrain.__file__, "exec"), pretrain.__dict__)
sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "n_query_groups": 2, "intermediate_size": 128, "block_size": 32}
pretrain.setup(
    "tiny-llama-1.1b",
    model_config=Config.from_name("tiny-llama-1.1b", padded_vocab_size=256, **sizes),
    out_dir=Path(f"{out}.run"),
    precision="bf16-true" if "bf16" in how else "32-true",
    data=Text(),
    train=TrainArgs(
        save_interval=None,
        log_interval=32,
        global_batch_size=8,
        micro_batch_size=4,
        max_tokens=64 * 8 * 32,
        max_norm=1.0,
        min_lr=4e-5,
        lr_warmup_steps=8,
    ),
    eval=EvalArgs(interval=1000, max_iters=2, final_validation=False),
    log=LogArgs(),
    optimizer={"class_path": "torch.optim.AdamW", "init_args": {"lr": 4e-4, "betas": [0.9, 0.95]}},
    devices=1,
    logger_name="csv",
)
trained = torch.load(next(Path(f"{out}.run").rglob("lit_model.pth")), weights_only=False)
torch.save({"model": trained.get("model", trained), "drawn": torch.rand(4)}, out)
