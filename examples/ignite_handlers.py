"""Ignite: a handler that begins the watch, and one that ends it.

python examples/ignite_handlers.py
"""

import torch
from ignite.engine import Engine, Events
from torch import nn

import update_watch as uw

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128), nn.ReLU(), nn.Linear(128, 1)).bfloat16()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)


def step(engine: Engine, batch: torch.Tensor) -> float:
    loss = (model(batch.bfloat16()).float() - batch[:, :4].sum(1, keepdim=True)).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


trainer = Engine(step)


@trainer.on(Events.STARTED)
def begin(engine: Engine) -> None:
    engine.state.watch = uw.watch(model, optimizer, window=64, journal="update_watch.jsonl")


@trainer.on(Events.COMPLETED | Events.EXCEPTION_RAISED)
def end(engine: Engine, *error: BaseException) -> None:
    engine.state.watch.close()
    print(engine.state.watch.last.headline)
    if error:
        raise error[0]


if __name__ == "__main__":
    trainer.run([torch.randn(32, 64) for _ in range(128)], max_epochs=2)
