"""Random trainings, each with a watch and without: no bit may differ, no watch may end by an error of its own.

    python bench/fuzz.py [--n 1000] [--seed 0]

Each training draws optimizer, number format, shapes (0-d, empty, one element, 5-D, channels last, views, tied), groups with
settings of their own, closures, schedules, autocast, a BF16 default dtype, inference mode, reloads, groups and parameters
added, gradients that are None, sparse, infinite or NaN, averages and the length of the window from its own seed, and is run
with a watch and without; where the two differ, once more without (what differs there too is torch's own doing).

Prints one JSON line: trainings, those that ended in torch's own error (the same with and without), seeds that differ between
two unwatched runs, and the seeds of differences, detachments and other errors, which must be empty.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from torch import Tensor, nn

import update_watch as uw

OPTIMIZERS: dict[str, Callable[[Any, random.Random], torch.optim.Optimizer]] = {
    "sgd": lambda p, r: torch.optim.SGD(p, lr=0.01, momentum=r.choice((0.0, 0.9)), nesterov=False),
    "nesterov": lambda p, r: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda p, r: torch.optim.Adam(p, lr=1e-3, amsgrad=r.random() < 0.3),
    "adamw": lambda p, r: torch.optim.AdamW(p, lr=r.choice((1e-5, 1e-3)), foreach=r.choice((None, False, True))),
    "adamw fused": lambda p, r: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw tensor": lambda p, r: torch.optim.AdamW(p, lr=torch.tensor(1e-3)),
    "adagrad": lambda p, r: torch.optim.Adagrad(p, lr=0.01),
    "adadelta": lambda p, r: torch.optim.Adadelta(p),
    "adamax": lambda p, r: torch.optim.Adamax(p),
    "asgd": lambda p, r: torch.optim.ASGD(p),
    "nadam": lambda p, r: torch.optim.NAdam(p),
    "radam": lambda p, r: torch.optim.RAdam(p),
    "rmsprop": lambda p, r: torch.optim.RMSprop(p, momentum=r.choice((0.0, 0.9)), centered=r.random() < 0.3),
    "rprop": lambda p, r: torch.optim.Rprop(p),
    "adafactor": lambda p, r: torch.optim.Adafactor(p),
    "lbfgs": lambda p, r: torch.optim.LBFGS(p, lr=0.1, max_iter=3),
}
SHAPES = ((), (0, 3), (1,), (7,), (64,), (5, 9), (33, 17), (300, 20), (2, 3, 2, 2, 2), (4, 3, 3, 3))
DTYPES = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float16, torch.float64)


@contextmanager
def _low_default() -> Iterator[None]:
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


AROUND: tuple[Callable[[], Any], ...] = (
    ExitStack,
    ExitStack,
    ExitStack,
    _low_default,
    lambda: torch.autocast("cpu", torch.bfloat16),
    torch.inference_mode,
)


def _param(draw: random.Random, generator: torch.Generator) -> nn.Parameter:
    shape, dtype = draw.choice(SHAPES), draw.choice(DTYPES)
    value = torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
    kind = draw.random()
    if kind < 0.1 and value.dim() == 4:
        value = value.contiguous(memory_format=torch.channels_last)
    elif kind < 0.2 and value.dim() == 2:
        value = value.t()
    elif kind < 0.3 and value.numel():
        value = torch.cat([value.reshape(-1)] * 2)[1 : 1 + value.numel()].reshape(shape)
    return nn.Parameter(value, requires_grad=draw.random() < 0.95)


def _gradient(param: nn.Parameter, draw: random.Random, generator: torch.Generator) -> Tensor | None:
    kind = draw.random()
    if kind < 0.05:
        return None
    grad = torch.randn(param.shape, generator=generator, dtype=torch.float32).to(param.dtype)
    if kind < 0.08 and grad.numel():
        grad.view(-1)[0] = draw.choice((float("nan"), float("inf"), 1e30, 0.0))
    elif kind < 0.1:
        grad.mul_(draw.choice((0.0, 1e9, 1e-9)))
    elif kind < 0.11 and grad.dim() == 2:
        return grad.to_sparse()
    return grad


def train(seed: int, is_watched: bool) -> tuple[str, str, str]:
    """Hash of all that the training left, torch's own error if one ended it, and an error of the watch."""
    draw, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    random.seed(seed)
    params = [_param(draw, generator) for _ in range(draw.randint(1, 7))]
    name = draw.choice(list(OPTIMIZERS))
    split = draw.randint(1, len(params))
    groups = [{"params": params[:split]}] + ([{"params": params[split:], "lr": 3e-3}] if params[split:] else [])
    if name == "lbfgs":
        groups = [{"params": params}]
    trouble = problem = ""
    average = {f"p{i}": p.detach().clone() for i, p in enumerate(params)} if draw.random() < 0.3 else None
    window, steps, around = draw.choice((1, 2, 5, 16, 64)), draw.randint(6, 40), draw.choice(AROUND)
    has_closure, reloads, grows = name == "lbfgs" or draw.random() < 0.2, draw.random() < 0.2, draw.random() < 0.2
    extra = _param(draw, generator)
    watch = None
    optimizer: torch.optim.Optimizer | None = None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer = OPTIMIZERS[name](groups, draw)
        except (RuntimeError, ValueError) as error:
            return "", repr(error), ""
        if is_watched:
            named = [(f"p{i}", p) for i, p in enumerate(params)]
            try:
                options: dict[str, Any] = {} if average is None else {"averages": {"ema": (average, 0.9)}}
                watch = uw.watch(named, optimizer, window=window, budget=draw.choice((None, 0.01)), **options)
            except Exception as error:  # what must never happen
                problem = f"watch raised {error!r}"
        else:
            draw.choice((None, 0.01))
        try:
            for step in range(steps):
                if reloads and step == steps // 2:
                    optimizer.load_state_dict(optimizer.state_dict())
                if grows and step == steps // 3 and name != "lbfgs":
                    optimizer.add_param_group({"params": [extra]})
                for param in (p for group in optimizer.param_groups for p in group["params"]):
                    param.grad = _gradient(param, draw, generator)
                with around():
                    optimizer.step((lambda: torch.zeros(())) if has_closure else None)  # type: ignore[arg-type]
                if average is not None:
                    for i, param in enumerate(params):
                        average[f"p{i}"].lerp_(param.detach().to(average[f"p{i}"].dtype), 0.1)
        except Exception as error:  # of many kinds: adafactor divides by the size of an empty tensor
            trouble = repr(error)[:200]
        if watch is not None:
            watch.close()
            if watch._tap.error is not None:
                problem = problem or f"detached: {watch._tap.error!r}"
    found = hashlib.sha256()
    states = [optimizer.state.get(p, {}) for p in (*params, extra)]
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_inference_mode_enabled()
    tensors: list[Any] = [*params, extra, *(p.grad for p in params), *(average or {}).values()]
    tensors += [v for state in states for _, v in sorted(state.items(), key=lambda item: str(item[0]))]
    for value in tensors:
        if isinstance(value, Tensor):
            dense = (value.to_dense() if value.is_sparse else value).detach().contiguous().reshape(-1)
            found.update(dense.view(torch.uint8).numpy().tobytes())
        else:
            found.update(repr(value).encode() if isinstance(value, (int, float, str)) else b"")
    found.update(repr((modes, torch.get_rng_state().sum().item(), random.getstate()[1][:8])).encode())
    return found.hexdigest()[:16], trouble, problem


def fuzz(count: int, seed: int = 0) -> dict[str, Any]:
    """Run `count` trainings; the numbers of the module's first lines."""
    torch.set_num_threads(1)
    level = logging.getLogger("update_watch").level
    logging.getLogger("update_watch").setLevel(logging.CRITICAL)
    troubled, unsteady = 0, []
    different: list[str] = []
    problems: list[str] = []
    for n in range(seed, seed + count):
        plain = train(n, False)
        watched = train(n, True)
        troubled += bool(plain[1])
        if watched[2]:
            problems.append(f"{n}: {watched[2]}"[:300])
        if plain[:2] != watched[:2]:
            again = train(n, False)
            (unsteady if again[:2] != plain[:2] else different).append(f"{n}: {plain} {watched}"[:400])
    logging.getLogger("update_watch").setLevel(level)
    return {
        "trainings": count,
        "ended_by_torch": troubled,
        "unsteady_unwatched": unsteady,
        "different": different,
        "problems": problems,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=1000, help="trainings")
    parser.add_argument("--seed", type=int, default=0, help="of the first one")
    options = parser.parse_args()
    found = fuzz(options.n, options.seed)
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["different"] or found["problems"]))


if __name__ == "__main__":
    main()
