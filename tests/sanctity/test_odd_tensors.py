"""Whatever kind of tensor torch has, as state, parameter, gradient or average: its row says why it is unknown, and the
others are measured. Nothing raises into training, nothing ends the watch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import update_watch as uw
from update_watch.odd_tensors import described, is_computable, shape_of, unreadable
from update_watch.report import Health, Report

SHAPE = (8, 8)
DTYPES = sorted({value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str)


def _zeros(dtype: torch.dtype) -> Tensor:
    return torch.zeros(64 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(SHAPE)


def _inference() -> Tensor:
    with torch.inference_mode():
        return torch.zeros(SHAPE)


def _quantised() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.quantize_per_tensor(torch.eye(8), 0.1, 0, torch.qint8)


def _compressed(make: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
    def made() -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return make(torch.eye(8))

    return made


def _nested(layout: torch.layout) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=layout)


TENSORS: dict[str, Callable[[], Tensor]] = {
    **{str(dtype).removeprefix("torch."): lambda dtype=dtype: _zeros(dtype) for dtype in DTYPES},
    "coo": lambda: torch.eye(8).to_sparse(),
    "csr": _compressed(lambda eye: eye.to_sparse_csr()),
    "csc": _compressed(lambda eye: eye.to_sparse_csc()),
    "bsr": _compressed(lambda eye: eye.to_sparse_bsr((2, 2))),
    "meta": lambda: torch.zeros(SHAPE, device="meta"),
    "quantised": _quantised,
    "nested": lambda: _nested(torch.strided),
    "jagged": lambda: _nested(torch.jagged),
    "mkldnn": lambda: torch.zeros(SHAPE).to_mkldnn(),
    "expanded": lambda: torch.zeros(1).expand(SHAPE),
    "conjugate": lambda: torch.zeros(SHAPE, dtype=torch.complex64).conj(),
    "empty": lambda: torch.zeros(0),
    "double scalar": lambda: torch.tensor(1.0, dtype=torch.float64),
    "parameter": lambda: nn.Parameter(torch.zeros(SHAPE)),
    "inference": _inference,
}
OTHERS: dict[str, Callable[[], Any]] = {
    "huge": lambda: 10**400,
    "negative huge": lambda: -(10**400),
    "imaginary": lambda: 1j,
    "infinite": lambda: float("inf"),
    "NaN": lambda: float("nan"),
    "text": lambda: "x",
    "None": lambda: None,
    "object": object,
    "list": lambda: [torch.zeros(SHAPE)],
    "dict": lambda: {"a": torch.zeros(SHAPE)},
    "generator": torch.Generator,
}


# of each of these one is as the others: they differ in what torch can compute with, in layout and in what may be asked
_LIKE_ANOTHER = {
    *("bits1x8", "bits2x4", "bits4x2", "bits16", "complex128", "qint32", "quint2x4", "quint4x2", "csc", "bsr"),
    *("float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu", "int16", "int32", "uint16", "uint32"),
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (1, 2, 3, 5, 6, 7)),
    *(
        "int4",
        "int8",
        "int64",
        "uint4",
        "uint8",
        "uint64",
        "qint8",
        "quint8",
        "bfloat16",
        "float16",
        "float32",
        "float64",
    ),
    *("csr", "empty", "double scalar", "parameter", "negative huge", "infinite", "text", "None", "list"),
}
_LIKE_ANOTHER_STATE = _LIKE_ANOTHER | {"bool", "complex32", "conjugate", "imaginary"}


def made(kinds: dict[str, Callable[[], Any]], like_another: Collection[str] = _LIKE_ANOTHER) -> Iterator[Any]:
    """Those that this torch can make; one of each kind where all of them would be slow."""
    for name, make in kinds.items():
        try:
            make()
        except (RuntimeError, NotImplementedError, TypeError):
            continue
        yield pytest.param(make, id=name, marks=[pytest.mark.slow] if name in like_another else [])


class Rule(torch.optim.Optimizer):
    """SGD that keeps something odd for every parameter, and leaves alone what it cannot compute with."""

    def __init__(self, params: Any, keep: Callable[[], Any] | None = None, at_once: bool = False) -> None:
        super().__init__(params, {"lr": 0.1})
        self.keep = keep
        for param in self.param_groups[0]["params"] if at_once and keep is not None else ():
            self.state[param]["kept"] = keep()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for param in group["params"]:
                grad = param.grad
                if grad is None or grad.layout is not torch.strided or grad.dtype is not param.dtype or param.is_meta:
                    continue
                if self.keep is not None and not self.state[param]:
                    self.state[param]["kept"] = self.keep()
                if param.shape == grad.shape and not unreadable(param):
                    param.sub_(group["lr"] * grad)


def _train(watch: uw.Watch, optimizer: torch.optim.Optimizer, *params: nn.Parameter) -> Report:
    generator = torch.Generator().manual_seed(0)
    for _ in range(9):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()
    report = watch.flush()
    assert watch._tap.error is None, repr(watch._tap.error)
    assert report is not None and report.step == 9
    return report


def _health(report: Report, name: str) -> Health:
    return {t.name: t for t in report.tensors}[name].health


@pytest.mark.parametrize(
    "at_once", [pytest.param(True, id="from-the-start", marks=pytest.mark.slow), pytest.param(False, id="in-the-step")]
)
@pytest.mark.parametrize("keep", made({**TENSORS, **OTHERS}, _LIKE_ANOTHER_STATE))
def test_a_state_of_any_kind_is_measured_or_unknown_with_the_reason(keep: Callable[[], Any], at_once: bool) -> None:
    low, full = nn.Parameter(torch.randn(SHAPE).bfloat16()), nn.Parameter(torch.randn(SHAPE))
    optimizer = Rule([low, full], keep, at_once)
    named = [("low", low), ("full", full)]
    if at_once:  # else there is no state yet
        uw.audit(named, optimizer)
    with uw.watch(named, optimizer, window=4) as watch:
        report = _train(watch, optimizer, low, full)
    uw.audit(named, optimizer)
    for tensor in report.tensors:
        assert tensor.health is Health.healthy or "Unknown, because" in tensor.advice, tensor


@pytest.mark.parametrize("make", made(TENSORS))
def test_a_parameter_of_any_kind_costs_its_own_row(make: Callable[[], Tensor]) -> None:
    odd, full = nn.Parameter(make(), requires_grad=False), nn.Parameter(torch.randn(SHAPE))
    optimizer = Rule([odd, full])
    named = [("odd", odd), ("full", full)]
    uw.audit(named, optimizer)
    with uw.watch(named, optimizer, window=4) as watch:
        report = _train(watch, optimizer, full)
    assert _health(report, "full") is Health.healthy
    assert _health(report, "odd") in (Health.frozen, Health.unknown)


@pytest.mark.parametrize("make", made(TENSORS))
def test_a_gradient_of_any_kind_costs_its_own_row(make: Callable[[], Tensor]) -> None:
    odd, full = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(SHAPE))
    optimizer = Rule([odd, full])
    named = [("odd", odd), ("full", full)]
    try:
        if hasattr(odd, "grad_dtype"):
            odd.grad_dtype = None
        odd.grad = make()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        pytest.skip(f"torch refuses such a gradient: {error}")
    grad = odd.grad
    with uw.watch(named, optimizer, window=4) as watch:
        report = _train(watch, optimizer, full)
        uw.audit(named, optimizer)
    assert odd.grad is grad
    assert _health(report, "full") is Health.healthy
    assert _health(report, "odd") in (Health.idle, Health.unknown)
    if unreadable(grad):
        assert _health(report, "odd") is Health.unknown


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("make", made({k: v for k, v in TENSORS.items() if k != "inference"}))
def test_an_average_of_any_kind_costs_its_own_row(make: Callable[[], Tensor]) -> None:
    odd, full = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(SHAPE))
    optimizer = Rule([odd, full])
    named = [("odd", odd), ("full", full)]
    average = {"odd": make(), "full": full.detach().clone()}
    uw.audit(named, optimizer, {"ema": list(average.items())})
    with uw.watch(named, optimizer, window=4, averages={"ema": (average, 0.9)}) as watch:
        report = _train(watch, optimizer, odd, full)
    found = {t.name: t for t in report.tensors}
    assert found["odd"].health is found["full"].health is Health.healthy
    assert "average:ema" in found["full"].accumulators
    if unreadable(average["odd"]):
        about = found["odd"].accumulators["average:ema"]
        assert about.health is Health.unknown and about.advice


def test_a_gradient_that_turns_odd_in_mid_run_costs_its_own_row() -> None:
    odd, full = nn.Parameter(torch.randn(SHAPE)), nn.Parameter(torch.randn(SHAPE))
    optimizer = Rule([odd, full])
    with uw.watch([("odd", odd), ("full", full)], optimizer, window=8) as watch:
        _train(watch, optimizer, odd, full)
        odd.grad_dtype = None
        odd.grad = _quantised()
        for _ in range(8):
            full.grad = torch.randn(SHAPE)
            optimizer.step()
        report = watch.flush()
    assert watch._tap.error is None and report is not None
    found = {t.name: t for t in report.tensors}
    assert found["full"].efficiency == pytest.approx(1, abs=1e-3)
    assert "its gradient cannot be read: it is quantised (qint8)" in found["odd"].advice


def test_sparse_momentum_costs_its_own_row() -> None:
    embedding, head = nn.Embedding(100, 8, sparse=True), nn.Linear(8, 4)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    with uw.watch(model, optimizer, window=8) as watch:
        for _ in range(40):
            optimizer.zero_grad()
            head(embedding(torch.randint(0, 100, (16,)))).square().mean().backward()
            optimizer.step()
        report = watch.flush()
    assert watch._tap.error is None and report is not None and report.step == 40
    found = {t.name: t for t in report.tensors}
    assert found["head.weight"].health is Health.healthy
    assert "sparse" in found["embedding.weight"].advice and found["embedding.weight"].health is Health.unknown


def test_complex_averages_are_unknown_and_warn_of_nothing() -> None:
    weight = nn.Parameter(torch.randn(SHAPE))
    average = {"w": torch.zeros(SHAPE, dtype=torch.complex64)}
    optimizer = Rule([weight])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with uw.watch([("w", weight)], optimizer, window=4, averages={"ema": (average, 0.9)}) as watch:
            report = _train(watch, optimizer, weight)
    assert "its values are complex" in report.tensors[0].accumulators["average:ema"].advice


# --- how they are asked -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", made(TENSORS))
def test_asking_a_tensor_of_any_kind_raises_nothing(make: Callable[[], Tensor]) -> None:
    tensor = make()
    reason = unreadable(tensor)
    assert isinstance(shape_of(tensor), tuple) and described(tensor).startswith("a ")
    if not reason:
        torch.stack([tensor.reshape(-1), tensor.reshape(-1)])


def test_what_can_be_computed_with_is_known() -> None:
    usual = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool, torch.complex64)
    assert all(map(is_computable, usual)) and is_computable(torch.float8_e4m3fn)
    assert not is_computable(torch.bits8) and not is_computable(torch.int4)


@pytest.mark.parametrize("lr", [1e-2, 1e-7, 1e-9, 1e-11])
def test_fp64_weights_have_a_true_figure_or_none(lr: float) -> None:
    """FP64 takes all of these updates: any efficiency off 1 would be that of samples in FP32."""
    weight = nn.Parameter(torch.randn(SHAPE, dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=lr)
    with uw.watch([("w", weight)], optimizer, window=16, budget=None) as watch:
        for _ in range(32):
            weight.grad = torch.randn(SHAPE, dtype=torch.float64)
            optimizer.step()
        report = watch.flush()
    assert report is not None
    found = report.tensors[0]
    assert found.efficiency is None or found.efficiency == pytest.approx(1, abs=0.02)
    assert found.health in (Health.healthy, Health.unknown)


# --- layers without a shape ----------------------------------------------------------------------------


def _lazy(used_from: int) -> tuple[Report, list[str]]:
    """A layer learns its size in the first forward pass, from some step on; its optimizer holds it from the start."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"known": nn.Linear(8, 8), "late": nn.LazyLinear(2)})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    titles: list[str] = []
    with uw.watch(model, optimizer, window=32, sinks=[lambda r: titles.extend(a.title for a in r.alerts)]) as watch:
        for step in range(96):
            optimizer.zero_grad()
            hidden = model["known"](torch.randn(16, 8))
            (hidden if step < used_from else model["late"](hidden)).square().mean().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None
    return report, titles


def test_a_layer_that_never_gets_a_shape_costs_the_others_nothing() -> None:
    report, titles = _lazy(10**9)
    of_known, of_late = ([t for t in report.tensors if t.name.startswith(name)] for name in ("known", "late"))
    assert {t.health for t in of_known} == {Health.healthy}
    assert {(t.health, t.cause) for t in of_late} == {(Health.idle, uw.Cause.no_gradient)}
    assert titles == []


@pytest.mark.parametrize("step", [0, 40])
def test_a_layer_is_measured_from_the_step_on_that_makes_it(step: int) -> None:
    report, titles = _lazy(step)
    assert {t.name: t.health for t in report.tensors if t.name.startswith("late")} == {
        "late.weight": Health.healthy,
        "late.bias": Health.healthy,
    }
    assert titles == []
