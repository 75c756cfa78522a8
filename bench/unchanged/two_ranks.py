"""DistributedDataParallel on gloo, to be started by torchrun."""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

out, *how = sys.argv[1:]
dist.init_process_group("gloo")
torch.manual_seed(0)
net = nn.Sequential(
    nn.Linear(64, 96), nn.LayerNorm(96), nn.GELU(), nn.Linear(96, 96), nn.LayerNorm(96), nn.Linear(96, 10)
)
if "bf16" in how:
    net.bfloat16()
model = DistributedDataParallel(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 64)
if "given" in how:
    import update_watch as uw

    uw.watch(model, optimizer, window=16, journal=f"{out}.jsonl" if dist.get_rank() == 0 else None)
torch.manual_seed(dist.get_rank())
for _ in range(64):
    x = torch.randn(16, 64)
    y = x[:, :10].argmax(1)
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x.to(net[0].weight.dtype)).float(), y).backward()
    optimizer.step()
    scheduler.step()
if dist.get_rank() == 0:
    torch.save({"model": net.state_dict(), "drawn": torch.rand(4)}, out)
dist.destroy_process_group()
