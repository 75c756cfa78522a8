"""What an optimizer merely keeps does not make it unknown; what it sets up in its first step is waited for; states of two kinds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from update_watch.report import Report


def train(make: Any, dtype: torch.dtype = torch.float32, steps: int = 24) -> Report:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.RMSNorm(64), nn.Linear(64, 64)).to(dtype)
    optimizer = make(model)
    with uw.watch(model, optimizer, window=steps, budget=None) as watch:
        for _ in range(steps):
            optimizer.zero_grad()
            (model(torch.randint(0, 64, (8, 16))).float() - 1).square().mean().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None
    return report


class Keeping(torch.optim.AdamW):
    """Keeps what packages keep: a used-up iterator, maps from tensors, the model, a seed in every state."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=1e-3)
        self.named = (pair for pair in model.named_parameters())
        list(self.named)
        self.names = {p: name for name, p in model.named_parameters()}
        self.model = model
        self.shapes = {name: [p] for name, p in model.named_parameters()}


class Overriding(torch.optim.SGD):
    """Looks for parameters of modules in its first step, as bitsandbytes does for embeddings."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.overrides, self.is_set_up = [(model[0], "weight")], False  # type: ignore[index]
        self.found: list[int] = []

    def step(self, closure: Any = None) -> Any:
        if not self.is_set_up:
            for module, name in self.overrides:
                wanted = getattr(module, name)
                assert isinstance(wanted, nn.Parameter)
                self.found += [i for i, p in enumerate(self.param_groups[0]["params"]) if p is wanted]
            self.is_set_up = True
        return super().step(closure)


class SettingUp(torch.optim.SGD):
    """Asks the model itself in its first step, which no copy can do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), lr=0.1)
        self.model, self.scale = model, 0.0

    def step(self, closure: Any = None) -> Any:
        if self.scale == 0.0:
            self.scale = 1.0 / len(list(self.model.modules()))
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.grad.mul_(self.scale)
        return super().step(closure)


class Seeded(torch.optim.Optimizer):
    """A state made with the optimizer: the seed of what each parameter is multiplied with."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.1})
        for i, p in enumerate(self.param_groups[0]["params"]):
            self.state[p]["seed"] = i

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                p.add_(p.grad, alpha=-self.param_groups[0]["lr"] / (1 + self.state[p]["seed"]))


@pytest.mark.parametrize("cls", [Keeping, Overriding, SettingUp, Seeded], ids=lambda cls: cls.__name__)
def test_measured_from_the_first_window(cls: Any) -> None:
    report = train(cls)
    assert {(str(t.health), t.advice) for t in report.tensors if str(t.health) == "unknown"} == set()
    for t in report.tensors:
        assert t.efficiency == pytest.approx(1, abs=1e-3), t.name


class Asking(SettingUp):
    """Asks the model in every step."""

    def step(self, closure: Any = None) -> Any:
        self.scale = 0.0
        return super().step(closure)


def test_what_is_used_in_every_step_is_unknown_with_the_reason() -> None:
    report = train(Asking)
    assert {str(t.health) for t in report.tensors} == {"unknown"}
    assert all("uses a Sequential ('modules')" in t.advice for t in report.tensors)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torchao's, on import
@pytest.mark.parametrize("name", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_quantised_states_beside_plain_ones_in_one_group(name: str) -> None:
    optim = pytest.importorskip("torchao.optim")
    with torch.compiler.set_stance("force_eager"):
        report = train(lambda model: getattr(optim, name)(model.parameters(), lr=1e-3))
    for t in report.tensors:
        assert (str(t.health), t.efficiency) == ("healthy", pytest.approx(1, abs=0.01)), (t.name, t.advice)


class Halved(Tensor):
    """Reports the shape of the parameter, and holds something else."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Any:
        return Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]

    def __init__(self, codes: Tensor) -> None:
        self.codes = codes

    def __tensor_flatten__(self) -> tuple[list[str], list[Any]]:
        return ["codes"], []

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Any:
        return cls(inner["codes"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(str(func))


class Mixed(torch.optim.Optimizer):
    """Momentum, kept in another kind of tensor from 4096 elements on."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model.parameters(), {"lr": 0.01})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if "momentum" not in state:
                codes = torch.zeros_like(p)
                state["momentum"] = Halved(codes) if p.numel() >= 4096 else codes
            kept = state["momentum"]
            codes = kept.codes if isinstance(kept, Halved) else kept
            codes.mul_(0.9).add_(p.grad)
            p.sub_(codes, alpha=self.param_groups[0]["lr"])


def test_a_kind_of_state_for_large_tensors_alone() -> None:
    for t in train(Mixed).tensors:
        assert (str(t.health), t.efficiency) == ("healthy", pytest.approx(1, abs=1e-3)), (t.name, t.advice)
