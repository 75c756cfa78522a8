"""The audit against numbers worked by hand, and against what a training then does."""

from __future__ import annotations

import copy
import json
import math
import time
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from update_watch.audit.audit import audit
from update_watch.audit.table import Audit, AuditRow, StallExpected
from update_watch.report import Health
from update_watch.wording import size

BF16 = torch.bfloat16
AdamW = torch.optim.AdamW


def named(**tensors: Tensor) -> list[tuple[str, Tensor]]:
    return [(name, torch.nn.Parameter(tensor)) for name, tensor in tensors.items()]


def matrix(rms: float = 0.02) -> Tensor:
    return rms * torch.randn(64, 48, generator=torch.Generator().manual_seed(0))


def of(pairs: list[tuple[str, Tensor]], cls: Any = AdamW, averages: Any = None, **settings: Any) -> Audit:
    return audit(pairs, cls([tensor for _, tensor in pairs], **settings), averages)


def row(found: Audit, component: str) -> AuditRow:
    (only,) = [row for row in found.rows if row.component == component]
    return only


# --- weights ------------------------------------------------------------------------------------------


def test_norms_at_one_are_expected_to_stall_and_small_matrices_are_not() -> None:
    found = row(of(named(norm=torch.ones(96).to(BF16), matrix=matrix().to(BF16)), lr=1e-3), "weights")
    assert found.health is Health.stalled
    assert found.names == ("norm",)
    assert (found.tensors, found.bytes) == (2, 2 * (96 + 64 * 48))
    assert (found.cure, found.cure_bytes) == ("FP32 master weights", 8 * (96 + 64 * 48))  # weight, gradient, two states


@pytest.mark.parametrize(
    ("lr", "lost", "health"),
    [
        pytest.param(2.0**-9, 1.0, Health.stalled, id="a-tie-goes-back-to-1"),
        pytest.param(2.0**-9 * 1.01, 0.5, Health.stalled, id="only-downwards-passes"),
        pytest.param(2.0**-8, 0.5, Health.stalled, id="upwards-is-a-tie"),
        pytest.param(2.0**-8 * 1.01, 0.0, Health.healthy, id="both-pass"),
    ],
)
def test_at_a_power_of_two_the_half_gap_is_another_on_each_side(lr: float, lost: float, health: Health) -> None:
    found = row(of(named(norm=torch.ones(96).to(BF16)), lr=lr), "weights")
    assert found.lost == lost
    assert found.health is health


@pytest.mark.parametrize("lr", [1e-3, 1e-4, 3e-5])
@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=["BF16", "FP16"])
def test_the_lost_share_is_the_one_a_first_step_then_shows(lr: float, dtype: torch.dtype) -> None:
    pairs = named(a=matrix().to(dtype), b=matrix(0.1).to(dtype))
    optimizer = AdamW([tensor for _, tensor in pairs], lr=lr, eps=1e-6, weight_decay=0.0)
    expected = row(audit(pairs, optimizer), "weights").lost
    before = [tensor.detach().clone() for _, tensor in pairs]
    for _, tensor in pairs:
        tensor.grad = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    optimizer.step()
    same = torch.cat([(tensor == start).flatten() for (_, tensor), start in zip(pairs, before, strict=True)])
    assert expected == pytest.approx(float(same.float().mean()), abs=0.06)  # 256 samples of 6144


def test_the_critical_learning_rate_is_the_median_half_gap() -> None:
    # BF16 from 1 to 2: half gap 2^-8 everywhere; from 1/4 to 1/2: 2^-10
    mixed = torch.tensor([1.3] * 60 + [0.3] * 40).to(BF16)
    assert row(of(named(a=mixed), lr=1e-3), "weights").critical_lr == pytest.approx(2.0**-8)
    # every element counts the same: a small tensor does not outweigh a large one
    pairs = named(small=1.3 * torch.ones(100).to(BF16), large=0.3 * torch.ones(1000).to(BF16))
    assert row(of(pairs, lr=1e-3), "weights").critical_lr == pytest.approx(2.0**-10)


def test_fp32_weights_lose_nothing() -> None:
    found = of(named(norm=torch.ones(96), matrix=matrix()), lr=1e-3)
    assert found.health is Health.healthy
    assert found.warnings == ()
    assert row(found, "weights").lost == 0.0


def test_where_updates_follow_the_gradients_nothing_is_said() -> None:
    found = of(named(norm=torch.ones(96).to(BF16)), torch.optim.SGD, lr=0.1, momentum=0.9)
    assert row(found, "weights").health is Health.unknown
    assert row(found, "weights").expected == "depends on gradients: an update under |weight| * 2^-9 to 2^-8 is lost"
    assert row(found, "weights").lost is None
    assert found.warnings == ()


def test_an_optimizer_that_keeps_the_remainder_gets_no_warning_about_weights() -> None:
    from torch.optim import Optimizer

    class Kahan(Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-5})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    rest = self.state[p].setdefault("rest", torch.zeros_like(p))
                    rest.sub_(p.grad.sign().mul_(group["lr"]))
                    before = p.clone()
                    p.add_(rest)
                    rest.add_(before.sub_(p))

    found = of(named(norm=torch.ones(96).to(BF16)), Kahan)
    assert row(found, "weights").health is Health.healthy
    assert found.warnings == ()


def test_a_schedule_is_judged_by_its_highest_learning_rate() -> None:
    pairs = named(norm=1.3 * torch.ones(96).to(BF16))
    optimizer = AdamW([tensor for _, tensor in pairs], lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 100)  # the warm-up sets it to 0
    assert optimizer.param_groups[0]["lr"] == 0.0
    assert row(audit(pairs, optimizer), "weights").rate == 0.01
    optimizer = AdamW([tensor for _, tensor in pairs], lr=0.01)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=10)
    assert row(audit(pairs, optimizer), "weights").rate == 0.02


def test_without_a_learning_rate_nothing_is_said() -> None:
    found = row(of(named(norm=torch.ones(96).to(BF16)), lr=0.0), "weights")
    assert (found.health, found.expected) == (Health.unknown, "its learning rate is 0 and no other is known")


def test_groups_with_their_own_learning_rates_are_judged_apart() -> None:
    pairs = named(low=1.3 * torch.ones(96).to(BF16), high=1.3 * torch.ones(96).to(BF16))
    groups = [{"params": [pairs[0][1]], "lr": 1e-4}, {"params": [pairs[1][1]], "lr": 1e-2}]
    found = row(audit(pairs, AdamW(groups)), "weights")
    assert found.names == ("low",)
    assert found.lost == 0.5
    assert "lr = 0.0001 to 0.01" in found.expected


# --- weight decay, states ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("decay", "lost"), [(2.0**-9, 1.0), (2.0**-8 * 1.01, 0.0)], ids=["no-weight-shrinks", "every-weight-shrinks"]
)
def test_decay_is_lost_below_2_to_the_minus_9_and_passes_above_2_to_the_minus_8(decay: float, lost: float) -> None:
    found = of(named(matrix=matrix().to(BF16)), lr=1e-3, weight_decay=decay / 1e-3)
    assert row(found, "weight decay").lost == lost
    assert row(found, "weight decay").health is (Health.stalled if lost else Health.healthy)


def test_decay_in_one_rounding_with_the_gradient_is_not_called_lost() -> None:
    found = of(named(matrix=matrix().to(BF16)), lr=1e-3, weight_decay=0.1, fused=True)
    assert row(found, "weight decay").health is Health.healthy
    assert row(found, "weight decay").lost is None


def test_decay_inside_the_gradient_is_no_accumulation() -> None:
    found = of(named(matrix=matrix().to(BF16)), torch.optim.Adam, lr=1e-3, weight_decay=0.1)
    assert "weight decay" not in [row.component for row in found.rows]


@pytest.mark.parametrize(
    ("beta", "health"),
    [(0.95, Health.healthy), (0.9965, Health.stalling), (0.997, Health.stalling), (0.999, Health.stalled)],
)
def test_a_second_moment_in_bf16_cannot_decay_above_its_beta(beta: float, health: Health) -> None:
    found = row(of(named(matrix=matrix().to(BF16)), betas=(0.9, beta)), "state exp_avg_sq")
    assert found.health is health
    assert found.rate == pytest.approx(1 - beta, rel=1e-3)
    # from 1 to 2 the half gap is 2^-8: values under 2^-8 / (1 - beta) are caught
    assert found.lost == pytest.approx(min(max(2.0**-8 / (1 - beta) - 1, 0.0), 1.0), abs=0.01)


@pytest.mark.parametrize("beta", [0.95, 0.999])
def test_a_second_moment_said_to_decay_does_and_one_said_not_to_does_not(beta: float) -> None:
    pairs = named(matrix=matrix().to(BF16))
    optimizer = AdamW([pairs[0][1]], betas=(0.9, beta))
    said = row(audit(pairs, optimizer), "state exp_avg_sq").health
    pairs[0][1].grad = torch.randn(64, 48, generator=torch.Generator().manual_seed(1)).to(BF16)
    optimizer.step()
    before = optimizer.state[pairs[0][1]]["exp_avg_sq"].clone()
    pairs[0][1].grad.zero_()
    optimizer.step()
    moved = bool((optimizer.state[pairs[0][1]]["exp_avg_sq"] != before).any())
    assert moved == (said is Health.healthy)


def test_a_step_counter_in_bf16_stops_at_256() -> None:
    class Counting(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            super().__init__(params, {"lr": 1e-3})

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("count", torch.zeros((), dtype=p.dtype)).add_(1)
                p.sub_(p.grad)

    found = of(named(matrix=matrix().to(BF16)), Counting)
    assert row(found, "state count").expected == "stops at 256"
    assert "The step counter 'count' is kept in BF16 and stops at 256: keep it in FP32." in found.warnings
    assert row(of(named(matrix=matrix()), Counting), "state count").health is Health.healthy


def test_states_that_exist_are_taken_as_they_are() -> None:
    pairs = named(matrix=matrix().to(BF16))
    optimizer = AdamW([pairs[0][1]])
    pairs[0][1].grad = torch.ones_like(pairs[0][1])
    optimizer.step()
    optimizer.state[pairs[0][1]]["exp_avg_sq"] = torch.zeros(64, 48)
    found = row(audit(pairs, optimizer), "state exp_avg_sq")
    assert (found.dtype, found.bytes, found.health) == ("float32", 4 * 64 * 48, Health.healthy)


def test_gradients_are_counted_and_frozen_ones_are_not() -> None:
    pairs = named(matrix=matrix().to(BF16), norm=torch.ones(96).to(BF16))
    pairs[1][1].requires_grad_(False)
    found = row(of(pairs), "gradients")
    assert (found.dtype, found.tensors, found.bytes) == ("bfloat16", 1, 2 * 64 * 48)


# --- averages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("decay", "health"), [(0.5, Health.healthy), (0.99, Health.stalling), (0.999, Health.stalled)])
def test_an_average_in_bf16_is_judged_by_the_gap_it_can_close(decay: float, health: Health) -> None:
    model = torch.nn.Linear(8, 8).to(BF16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    found = row(audit(model, AdamW(model.parameters()), {"ema": average}), "average ema")
    assert found.health is health
    assert found.rate == pytest.approx(1 - decay, rel=1e-4)
    low = round(100 * 2.0**-9 / (1 - decay))
    assert f"differ by {'under 1' if low == 0 else low}%" in found.expected


def test_an_average_in_fp32_follows() -> None:
    model = torch.nn.Linear(8, 8).to(BF16)
    average = copy.deepcopy(model).float()
    found = audit(model, AdamW(model.parameters()), {"ema": average})
    assert row(found, "average ema").health is Health.healthy


def test_the_decay_of_an_average_that_does_not_tell_is_unknown() -> None:
    model = torch.nn.Linear(8, 8).to(BF16)
    for average in (copy.deepcopy(model), AveragedModel(model)):  # the second weighs all steps alike
        found = row(audit(model, AdamW(model.parameters()), {"swa": average}), "average swa")
        assert (found.health, found.rate) == (Health.unknown, None)


# --- the whole --------------------------------------------------------------------------------------------


def test_tensors_without_an_optimizer_are_named_and_frozen_ones_only_counted() -> None:
    pairs = named(held=matrix(), forgotten=torch.ones(8), frozen=torch.ones(8))
    pairs[2][1].requires_grad_(False)
    found = audit(pairs, AdamW([pairs[0][1]]))
    assert found.warnings == ("1 tensor requires a gradient, but no optimizer holds them: forgotten.",)
    assert row(found, "weights, frozen").health is Health.frozen
    assert row(found, "weights, in no optimizer").tensors == 1


def test_master_weights_that_are_not_the_models_own_raise_no_alarm() -> None:
    model = torch.nn.Linear(8, 8).to(BF16)
    masters = [torch.nn.Parameter(p.detach().float()) for p in model.parameters()]
    found = audit(model, AdamW(masters, lr=1e-5))
    assert found.warnings == ()
    assert found.notes == (
        "The optimizer holds 2 tensors that are not the model's own, such as FP32 master weights; what is said of them"
        " holds for them, not for the model's copies.",
    )


def test_an_optimizer_that_cannot_be_tried_is_unknown_with_its_reason() -> None:
    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            raise RuntimeError("needs a cluster")

    found = of(named(norm=torch.ones(96).to(BF16)), Broken, lr=0.1)
    assert row(found, "weights").health is Health.unknown
    assert found.notes == (
        "Not everything is known of Broken: Broken fails on a synthetic parameter: RuntimeError('needs a cluster').",
    )


def test_an_optimizer_whose_updates_cannot_be_replayed_is_named_before_the_first_step() -> None:
    class Noisy(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                p.grad.add_(torch.randn(p.shape))
            return super().step(closure)

    found = of(named(w=torch.ones(9), v=torch.ones(9)), Noisy, lr=0.1)
    assert found.notes == (
        "What Noisy intends will not be measured: Noisy draws random numbers in its step, and a replay draws others.",
    )


def test_complex_weights_are_unknown_and_fp64_is_healthy() -> None:
    found = of(named(wave=torch.ones(8, dtype=torch.complex64), double=torch.ones(8, dtype=torch.float64)))
    healths = {row.dtype: (row.health, row.expected) for row in found.rows if row.component == "weights"}
    assert healths == {
        "complex64": (Health.unknown, "its weights are complex"),
        "float64": (Health.healthy, "FP64 resolves its changes"),
    }


def test_several_optimizers_are_audited_together() -> None:
    pairs = named(a=matrix().to(BF16), b=matrix().to(BF16))
    found = audit(pairs, [AdamW([pairs[0][1]]), torch.optim.SGD([pairs[1][1]], lr=0.1)])
    assert [row.tensors for row in found.rows if row.component == "weights"] == [1, 1]


def test_nothing_is_touched() -> None:
    model = torch.nn.Linear(32, 32).to(BF16)
    optimizer = AdamW(model.parameters(), lr=1e-3)
    optimizer.register_step_pre_hook(lambda *_: pytest.fail("the real optimizer must not step"))
    weights, groups = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    random_state, threads = torch.get_rng_state(), torch.get_num_threads()
    audit(model, optimizer, {"ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))})
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert optimizer.state_dict() == groups
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.get_num_threads() == threads
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_thousand_tensors_take_under_a_second() -> None:
    shapes = [(64 + 8 * (i % 7), 48) if i % 3 else (64,) for i in range(1000)]
    pairs = [(f"layer{i}.weight", torch.nn.Parameter(torch.randn(shape).to(BF16))) for i, shape in enumerate(shapes)]
    optimizer = AdamW([tensor for _, tensor in pairs])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # time of one core: other work on this machine does not count
    try:
        started = time.process_time()
        found = audit(pairs, optimizer)
        seconds = time.process_time() - started
    finally:
        torch.set_num_threads(threads)
    assert sum(row.tensors for row in found.rows if row.component == "weights") == 1000
    assert seconds < 1.0


def test_warnings_say_what_was_expected_and_what_to_do() -> None:
    pairs = named(norm1=torch.ones(64).to(BF16), norm2=torch.ones(64).to(BF16), matrix=matrix().to(BF16))
    average = [("norm1", torch.ones(64).to(BF16))]
    found = of(pairs, lr=1e-3, weight_decay=0.1, averages={"ema": average})
    critical = f"{row(found, 'weights').critical_lr:.2g}"
    assert found.warnings == (
        "2 of 3 BF16 weight tensors are expected to stall at learning rate 0.001: norm1, norm2. Keep FP32 master"
        " weights (+25.6 kB), or use Kahan summation (+6.4 kB) or stochastic rounding (no memory). Updates are often"
        f" smaller than the learning rate and more of them is then lost; below {critical} half of all would be.",
        "Weight decay is lost in BF16 weights: lr * weight_decay = 0.0001 per step, and 0.0039 is needed for every"
        " weight to shrink. Keep FP32 master weights, or set fused=True, which adds decay and gradient in one rounding.",
        "Optimizer state exp_avg_sq in BF16: none of its values can decay at 1 - beta = 0.001, while growth passes."
        " Keep the optimizer state in FP32 (+6.4 kB), or use a beta of at most 0.9961.",
    )
    assert math.isclose(float(critical), 3e-5, rel_tol=0.3)


def test_the_average_says_what_gap_it_needs() -> None:
    model = torch.nn.Linear(8, 8, bias=False).to(BF16)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    found = audit(model, AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95)), {"ema": average})
    assert found.warnings[-1] == (
        "The average 'ema' in BF16 (1 - decay = 0.001) moves only where it differs from the weight by 195% to 391% of"
        " its value. Keep the averaged model in FP32 (+128 B)."
    )


def test_the_text_shows_every_row_within_the_width_of_a_page() -> None:
    found = of(named(norm=torch.ones(64).to(BF16)), lr=1e-3)
    text = str(found)
    for component in ("weights", "weight decay", "state step", "state exp_avg", "state exp_avg_sq", "gradients"):
        assert f"\n{component} " in text
    assert max(map(len, text.splitlines())) <= 120
    assert f"{size(found.bytes)} in all; every cure together costs {size(found.cure_bytes)}." in text
    assert "- 1 of 1 BF16 weight tensor is expected to stall" in text


def test_the_data_are_plain_json_and_whole() -> None:
    found = of(named(norm=torch.ones(64).to(BF16)), lr=1e-3)
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert data["health"] == "stalled"
    assert data["bytes"] == sum(row["bytes"] for row in data["rows"]) == found.bytes
    assert data["weights_lost"] == 1.0
    assert data["rows"][0] == {
        "component": "weights",
        "dtype": "bfloat16",
        "tensors": 1,
        "bytes": 128,
        "expected": "1 stalled; 100% of updates of size lr = 0.001 lost; half below 0.002",
        "health": "stalled",
        "rate": 1e-3,
        "lost": 1.0,
        "critical_lr": pytest.approx(2.0**-9),
        "names": ["norm"],
        "cure": "FP32 master weights",
        "cure_bytes": 512,
    }


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (999_600, "1 MB"), (7 * 10**12, "7 TB")]
)
def test_sizes_are_written_for_people(count: int, text: str) -> None:
    assert size(count) == text


def test_arguments_that_cannot_be_used_are_named() -> None:
    optimizer = AdamW(torch.nn.Linear(2, 2).parameters())
    with pytest.raises(TypeError, match=r"audit\(model=int\): expected a torch module or"):
        audit(3, optimizer)
    with pytest.raises(TypeError, match=r"audit\(averages\['ema'\]=dict\)"):
        audit(torch.nn.Linear(2, 2), optimizer, {"ema": {}})
    with pytest.raises(TypeError, match="torch optimizer"):
        audit(torch.nn.Linear(2, 2), object())


# --- the gate -----------------------------------------------------------------------------------------------


def _gated(dtype: torch.dtype) -> Audit:
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.RMSNorm(16)).to(dtype)
    return audit(model, torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0))


def test_a_gate_raises_with_the_table_where_something_will_stall_and_is_silent_where_nothing_will() -> None:
    found = _gated(torch.bfloat16)
    with pytest.raises(StallExpected, match=r"expected to stall: weights \(bfloat16\)") as caught:
        found.check()
    assert str(found) in str(caught.value)
    _gated(torch.float32).check()


def test_what_is_allowed_passes_the_gate_and_nothing_else() -> None:
    found = _gated(torch.bfloat16)
    with pytest.raises(StallExpected, match=r"0\.weight"):
        found.check(allow=["1.weight", "state *"])
    found.check(allow="*")


# --- FP32 that is none -------------------------------------------------------------------------------------


def test_fp32_numbers_that_went_through_bf16_are_named_and_their_twins_are_not() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.RMSNorm(24))
    optimizer = AdamW(model.parameters())
    model(torch.randn(8, 24)).square().mean().backward()
    optimizer.step()
    assert audit(model, optimizer).seen == ()
    audit(model, optimizer).check()
    for state in optimizer.state.values():
        state["exp_avg"].copy_(state["exp_avg"].bfloat16())
    (found,) = audit(model, optimizer).seen
    assert found.startswith("3 of 3 FP32 exp_avg tensors hold nothing but values of BF16")
    resumed = copy.deepcopy(model).bfloat16().float()
    fresh = audit(resumed, AdamW(resumed.parameters()))
    (found,) = fresh.seen
    assert found.startswith("2 of 3 FP32 weight tensors hold") and "0.weight, 0.bias" in found
    assert found[:40] in str(fresh) and fresh.health is not Health.stalled
    new = torch.nn.Sequential(torch.nn.Linear(24, 24), torch.nn.RMSNorm(24))  # weights of 1 are values of any format
    assert audit(new, AdamW(new.parameters())).seen == ()


def test_masters_that_are_the_rounded_weights_are_named_after_a_resume_and_not_at_the_start() -> None:
    weights = named(w=matrix().bfloat16())
    master = torch.nn.Parameter(weights[0][1].detach().float())
    optimizer = AdamW([master])
    assert audit(weights, optimizer).seen == ()
    master.grad = torch.randn_like(master)
    optimizer.step()
    assert audit(weights, optimizer).seen == ()
    with torch.no_grad():
        master.copy_(master.bfloat16())
    (found,) = audit(weights, optimizer).seen
    assert found.startswith("1 of 1 FP32 master tensor holds nothing but values of BF16")
