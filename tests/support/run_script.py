"""A training script that knows nothing of update-watch, for the tests of `update-watch run`.

python run_script.py OUT [bf16] [compiled] [ranks] [fails] [waits] [masters] [gan]
"""

import os
import sys
import time

import torch
from torch import nn

out, *how = sys.argv[1:]
torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(32, 48), nn.RMSNorm(48), nn.Linear(48, 32))
if "bf16" in how or "masters" in how:
    model.bfloat16()
net = model
if "ranks" in how:
    torch.distributed.init_process_group("gloo")
    net = nn.parallel.DistributedDataParallel(model)
if "compiled" in how:
    net = torch.compile(model, backend="eager")
stepped = list(model.parameters())
if "masters" in how:
    stepped = [p.detach().float().clone().requires_grad_() for p in model.parameters()]
if "gan" in how:

    class Critic(nn.Sequential):
        pass

    critic = Critic(nn.Linear(32, 24), nn.RMSNorm(24), nn.Linear(24, 1)).bfloat16()
    judging = torch.optim.AdamW(critic.parameters(), lr=1e-5)
    log_alpha = torch.zeros(1, requires_grad=True)  # of no module
    tuning = torch.optim.SGD([log_alpha], lr=0.1)
optimizer = torch.optim.AdamW(stepped, lr=1e-5 if "bf16" in how else 1e-3)
step = torch.compile(optimizer.step, backend="eager") if "compiled" in how else optimizer.step
for i in range(48):
    model.zero_grad()
    x = torch.randn(8, 32).to(next(model.parameters()).dtype)
    (net(x) - x).float().square().sum().backward()
    if "masters" in how:
        for master, p in zip(stepped, model.parameters(), strict=True):
            master.grad = p.grad.float()
    step()
    if "masters" in how:
        with torch.no_grad():
            for master, p in zip(stepped, model.parameters(), strict=True):
                p.copy_(master)
    if "gan" in how:
        critic.zero_grad()
        critic(x.bfloat16()).float().square().sum().backward()
        judging.step()
        log_alpha.grad = torch.ones(1)
        tuning.step()
    if "waits" in how and i == 20:
        print("waiting", flush=True)
        time.sleep(60)
kept = {**critic.state_dict(), "state": judging.state_dict()} if "gan" in how else {}
if int(os.environ.get("RANK", 0)) == 0:
    torch.save(
        {"model": model.state_dict(), "drawn": torch.rand(4), "state": optimizer.state_dict(), "critic": kept}, out
    )
print("trained", flush=True)
if "ranks" in how:
    torch.distributed.destroy_process_group()
if "fails" in how:
    sys.exit(7)
