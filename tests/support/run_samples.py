"""Synthetic runs made of Report values, for the tests of journal, HTML report and terminal.

Not hard-coded pictures: learning rate, size of the weights and the spread of the updates decide what is lost, as in a
real run. Headroom is normal around log2(update / half a gap); what lies below 0 is lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from update_watch.foresight.divergence import Divergence, Sign
from update_watch.foresight.forecasts import Forecast
from update_watch.report import (
    HEADROOM_BINS,
    HEADROOM_LOW,
    SEVERITY,
    AccumulatorReport,
    Alert,
    Cause,
    Health,
    LayerReport,
    Level,
    Report,
    TensorReport,
    weighted_mean,
)

START = 1_780_000_000.0  # seconds since the epoch
CURE = (
    "keep FP32 master weights (precision='bf16-mixed') or use stochastic rounding (torchao) or Kahan summation (optimi)"
)


@dataclasses.dataclass(frozen=True)
class Spec:
    """One tensor of the synthetic model."""

    name: str
    shape: tuple[int, ...]
    rms: float  # of the weights
    kind: str = "bf16"  # bf16 | fp32 | frozen | idle | unknown | broken

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def gpt(blocks: int = 5, width: int = 256) -> tuple[Spec, ...]:
    """A small GPT: 5 blocks have 68 tensors."""
    found = [Spec("transformer.wte.weight", (50304, width), 0.02), Spec("transformer.wpe.weight", (1024, width), 0.02)]
    for i in range(blocks):
        b = f"transformer.h.{i}"
        depth = 0.02 / math.sqrt(1 + i)
        found += [
            Spec(f"{b}.ln_1.weight", (width,), 1.0),
            Spec(f"{b}.ln_1.bias", (width,), 0.01),
            Spec(f"{b}.attn.c_attn.weight", (3 * width, width), 0.05),
            Spec(f"{b}.attn.c_attn.bias", (3 * width,), 0.01),
            Spec(f"{b}.attn.c_proj.weight", (width, width), 0.03 + depth),
            Spec(f"{b}.attn.c_proj.bias", (width,), 0.01),
            Spec(f"{b}.ln_2.weight", (width,), 1.0),
            Spec(f"{b}.ln_2.bias", (width,), 0.01),
            Spec(f"{b}.mlp.c_fc.weight", (4 * width, width), 0.12),
            Spec(f"{b}.mlp.c_fc.bias", (4 * width,), 0.02),
            Spec(f"{b}.mlp.c_proj.weight", (width, 4 * width), 0.04),
            Spec(f"{b}.mlp.c_proj.bias", (width,), 0.01),
            Spec(f"{b}.attn.scale", (8,), 4.0),
        ]
    found.append(Spec("transformer.ln_f.weight", (width,), 1.0))
    return tuple(found)


def large(tensors: int = 2000) -> tuple[Spec, ...]:
    """A deep model of so many tensors."""
    parts = (
        ("attn.q_proj.weight", (512, 512), 0.02),
        ("attn.k_proj.weight", (512, 512), 0.02),
        ("attn.v_proj.weight", (512, 512), 0.02),
        ("attn.o_proj.weight", (512, 512), 0.03),
        ("mlp.gate_proj.weight", (2048, 512), 0.03),
        ("mlp.up_proj.weight", (2048, 512), 0.04),
        ("mlp.down_proj.weight", (512, 2048), 0.02),
        ("input_layernorm.weight", (512,), 1.0),
        ("post_attention_layernorm.weight", (512,), 1.0),
        ("mlp.router.bias", (16,), 0.01),
    )
    return tuple(
        Spec(f"model.layers.{i // len(parts)}.{parts[i % len(parts)][0]}", *parts[i % len(parts)][1:])
        for i in range(tensors)
    )


def learning_rate(progress: float, peak: float = 1e-3, warmup: float = 0.05, floor: float = 0.02) -> float:
    """Linear warm-up, then cosine decay to `floor` of the peak."""
    if progress < warmup:
        return peak * (0.1 + 0.9 * progress / warmup)
    decay = 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))
    return peak * (floor + (1 - floor) * decay)


def synthetic_run(
    specs: tuple[Spec, ...] | None = None,
    windows: int = 60,
    window: int = 128,
    peak: float = 1e-3,
    precision: str = "bf16",
    seed: int = 0,
    has_states: bool = True,
) -> Iterator[Report]:
    """Reports of a whole run. `precision` "fp32" is the healthy twin."""
    specs = gpt() if specs is None else specs
    rng = np.random.default_rng(seed)
    since: dict[str, tuple[Health, int]] = {}
    for k in range(windows):
        lr = learning_rate((k + 0.5) / windows, peak)
        noise = rng.normal(size=(len(specs), 3))
        tensors = []
        for spec, z in zip(specs, noise, strict=True):
            tensor = _tensor(spec, lr, peak, z, precision, has_states)
            before = since.get(spec.name)
            if before is None or before[0] is not tensor.health:
                since[spec.name] = (tensor.health, k * window)
            tensors.append(dataclasses.replace(tensor, since_step=since[spec.name][1]))
        yield _report(tensors, since, (k + 1) * window, window, START + 40.0 * (k + 1), float(noise[0, 2]))


def _tensor(spec: Spec, lr: float, peak: float, z: np.ndarray, precision: str, has_states: bool) -> TensorReport:
    kind = "fp32" if precision == "fp32" and spec.kind == "bf16" else spec.kind
    dtype = "float32" if kind == "fp32" else "bfloat16"
    group = "0/1" if len(spec.shape) == 1 else "0/0"
    base = TensorReport(
        spec.name,
        Health.healthy,
        layer=spec.name.rpartition(".")[0],
        dtype=dtype,
        shape=spec.shape,
        numel=spec.numel,
        optimizer_group=group,
        lr=lr,
    )
    if kind == "frozen":
        text = "It is frozen: requires_grad is False; to train it, set requires_grad=True and give it to an optimizer."
        return dataclasses.replace(
            base, health=Health.frozen, cause=Cause.requires_grad_off, advice=text, trainable=False, lr=None
        )
    if kind == "idle":
        text = (
            "Its gradient was None in all 128 steps that were looked at; check that forward uses it and that nothing "
            "detaches it from the loss."
        )
        return dataclasses.replace(base, health=Health.idle, cause=Cause.no_gradient, advice=text)
    if kind == "unknown":
        text = "Unknown, because optimizer Sophia looks at whole tensors and could not be replayed."
        return dataclasses.replace(base, health=Health.unknown, cause=Cause.not_replayable, advice=text)
    if kind == "broken":
        text = (
            "NaN or infinity among its weights, gradients or updates; go back to a checkpoint from before and lower the "
            "learning rate, clip the gradients, or look for log(0) and overflow."
        )
        return dataclasses.replace(base, health=Health.broken, cause=Cause.non_finite, advice=text)
    ratio = lr / spec.rms * 2 ** (0.15 * z[0])
    bits = 24 if kind == "fp32" else 8
    mean, spread = math.log2(ratio) + bits + 0.5, 1.8
    lost = _normal_below(-mean / spread)
    efficiency = min(1.01, max(0.0, 1 - _normal_below(-(mean + 0.8) / spread) + 0.006 * z[1]))
    health = Health.stalled if efficiency < 0.1 else Health.stalling if efficiency < 0.8 else Health.healthy
    critical = lr * 2**-mean
    advice = ""
    if health is not Health.healthy:
        advice = (
            f"BF16 weights without an FP32 master round the updates away (efficiency {efficiency:.2f}, "
            f"{100 * lost:.0f}% lost); {CURE}, or keep the learning rate above {critical:.2g} (now {lr:.2g}), below which "
            "half of the updates are lost; either repair raises the effective learning rate, so retune it."
        )
    return dataclasses.replace(
        base,
        health=health,
        cause=None if health is Health.healthy else Cause.weight_rounding,
        advice=advice,
        efficiency=efficiency,
        efficiency_error=0.004,
        displacement_efficiency=max(0.0, efficiency - 0.02 * abs(z[2])),
        lost_fraction=lost,
        wanted_fraction=0.31 if "wte" in spec.name else 1.0,
        update_ratio=ratio,
        applied_ratio=ratio * math.sqrt(max(efficiency, 1e-6)),
        headroom_histogram=_histogram(mean, spread),
        critical_lr=critical,
        state_factor=1.0 + 0.01 * z[2],
        accumulators=_states(spec, lr, kind, z) if has_states else {},
    )


def _states(spec: Spec, lr: float, kind: str, z: np.ndarray) -> dict[str, AccumulatorReport]:
    dtype = "float32" if kind == "fp32" else "bfloat16"
    first = AccumulatorReport(
        "exp_avg", dtype, Health.healthy, None, "", 0.991 + 0.003 * z[0], 0.98, 0.02, 1.0, 0.99, 0.98
    )
    if kind == "fp32":
        second = AccumulatorReport("exp_avg_sq", dtype, Health.healthy, None, "", 0.999, 0.998, 0.0, 1.0, 1.0, 0.999)
        decay = AccumulatorReport("weight_decay", dtype, Health.healthy, None, "", 1.0, 1.0, 0.0, 1.0)
    else:
        text = (
            "Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001 (efficiency of the decay 0.03), "
            "so it can grow but not shrink; keep the optimizer state in FP32 or use a beta of at most 0.9961."
        )
        second = AccumulatorReport(
            "exp_avg_sq",
            dtype,
            Health.stalled,
            Cause.state_rounding,
            text,
            0.62 + 0.02 * z[1],
            0.5,
            0.9,
            1.0,
            0.94,
            0.03,
        )
        text = (
            f"Weight decay (lr * weight_decay = {lr * 0.1:.2g} per step) is lost in BF16 weights (efficiency 0.00, 100% "
            "lost); keep FP32 master weights (precision='bf16-mixed'), or use stochastic rounding, or an optimizer that "
            "adds decay and gradient in one rounding (fused=True); the decay then starts to act."
        )
        decay = AccumulatorReport(
            "weight_decay", dtype, Health.stalled, Cause.decay_rounding, text, 0.0, 0.0, 1.0, 1.0, None, 0.0
        )
    found = {"exp_avg": first, "exp_avg_sq": second}
    return {**found, "weight_decay": decay} if len(spec.shape) > 1 else found


def _report(tensors: list[TensorReport], since: dict, step: int, window: int, time: float, z: float) -> Report:
    rank = SEVERITY.index
    bad = sorted((t for t in tensors if rank(t.health) < 3), key=lambda t: (rank(t.health), t.efficiency or 0))
    fresh = [t for t in bad if t.since_step == step - window]
    alerts = []
    for health, level in ((Health.stalled, Level.error), (Health.stalling, Level.warn), (Health.broken, Level.error)):
        new = [t for t in fresh if t.health is health]
        if new:
            title = f"{len(new)} of {len(tensors)} tensors {health} ({new[0].cause})"
            lines = [f"- {t.name}: {t.health} since step {t.since_step}. {t.advice}" for t in new[:3]]
            if len(new) > 3:
                lines.append(f"and {len(new) - 3} more: {', '.join(t.name for t in new[3:8])}")
            alerts.append(Alert(step, level, title, "\n".join(lines), tuple(t.name for t in new), new[0].cause))
    layers: dict[str, list[TensorReport]] = {}
    for tensor in tensors:
        layers.setdefault(tensor.layer, []).append(tensor)
    rolled = []
    for name, members in layers.items():
        worst = min((t.health for t in members), key=rank)
        names = tuple(t.name for t in members if t.health is worst)
        rolled.append(LayerReport(name, worst, names, weighted_mean((t.efficiency, t.numel) for t in members)))
    return Report(
        step=step,
        window=window,
        health=bad[0].health if bad else Health.healthy,
        headline=_headline(tensors, bad),
        tensors=tuple(tensors),
        layers=tuple(rolled),
        alerts=tuple(alerts),
        time=time,
        cost_ms=0.21 + 0.02 * abs(z),
    )


def _headline(tensors: list[TensorReport], bad: list[TensorReport]) -> str:
    if not bad:
        healthy = sum(t.health is Health.healthy for t in tensors)
        return f"All {healthy} tensors are healthy (efficiency 1.00)."
    first = [t for t in bad if t.health is bad[0].health]
    also = len(bad) - len(first)
    count = f"{len(first)} of {len(tensors)} tensors are {bad[0].health} since step {min(t.since_step for t in first)}"
    if bad[0].health is Health.broken:
        return f"{count}: NaN or infinity among its weights, gradients or updates."
    mean = weighted_mean((t.efficiency, t.numel) for t in first)
    lost = weighted_mean((t.lost_fraction, t.numel) for t in first)
    text = (
        f"{count}: BF16 weights without an FP32 master round the updates away (efficiency {mean:.2f}, "
        f"{100 * lost:.0f}% lost); {CURE}"
    )
    return f"{text}; also {also} stalling (rounded away)." if also else f"{text}."


def _normal_below(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _histogram(mean: float, spread: float) -> tuple[float, ...]:
    edges = [HEADROOM_LOW + i for i in range(HEADROOM_BINS + 1)]
    below = [_normal_below((edge - mean) / spread) for edge in edges]
    below[0], below[-1] = 0.0, 1.0
    return tuple(b - a for a, b in zip(below, below[1:], strict=False))


def fully_filled_report() -> Report:
    """A report in which every field of every type holds something."""
    tensor = TensorReport(
        name="emb.weight",
        health=Health.stalling,
        cause=Cause.weight_rounding,
        advice="BF16 weights lose 42% (efficiency 0.58); keep the learning rate above 1.2e-05.",
        names=("emb.weight", "head.weight"),
        layer="emb",
        optimizer_group="1/2",
        dtype="bfloat16",
        shape=(12, 5),
        numel=60,
        trainable=True,
        scheme="carried:kahan_comp",
        low_states=2,
        options=("fused", "beta2"),
        efficiency=0.5812,
        efficiency_error=0.0123,
        net_efficiency=0.5612,
        net_efficiency_error=0.0234,
        displacement_efficiency=0.5712,
        lost_fraction=0.4201,
        lost_fraction_error=0.0101,
        wanted_fraction=0.3333,
        update_ratio=0.001234,
        update_ratio_error=0.0001234,
        applied_ratio=0.0009876,
        weight_rms=0.02345,
        written_between=0.0001234,
        moved=0.01234,
        unmoved_fraction=0.125,
        gradient_rms=0.0123,
        gradient_max=0.345,
        gradient_spread=0.4312,
        gradient_zeros=0.125,
        copy_changed=0.0312,
        copy_changed_window=0.75,
        headroom_histogram=tuple(0.25 if i in (3, 9, 10, 31) else 0.0 for i in range(HEADROOM_BINS)),
        movement_histogram=tuple(0.5 if i in (4, 30) else 0.0 for i in range(HEADROOM_BINS)),
        movement_lr=0.0004,
        movement_places=(0.25, 0.0, 0.5, 0.25),
        lr=0.0003,
        critical_lr=1.2e-05,
        state_factor=0.9312,
        state_factor_error=0.0123,
        since_step=123_456_789,
        accumulators={
            "exp_avg_sq": AccumulatorReport(
                "exp_avg_sq",
                "bfloat16",
                Health.stalled,
                Cause.state_rounding,
                "State stands still (efficiency 0.03).",
                0.03,
                0.02,
                0.97,
                0.5,
                0.9,
                0.01,
            )
        },
        what_if={"bfloat16": 0.25},
    )
    bare = TensorReport("head.bias", Health.unknown, advice="Unknown, because it is new.")
    return Report(
        step=256,
        window=128,
        health=Health.stalling,
        headline="1 of 2 tensors is stalling.",
        tensors=(tensor, bare),
        layers=(
            LayerReport("emb", Health.stalling, ("emb.weight",), 0.5812),
            LayerReport("", Health.unknown, ("head.bias",), None),
        ),
        alerts=(
            Alert(
                256, Level.warn, "stalling", "emb.weight\nis stalling", ("emb.weight",), Cause.weight_rounding, "Critic"
            ),
        ),
        time=1_780_000_000.125,
        cost_ms=0.25,
        skipped_steps=3,
        observed_steps=17,
        cost_share=0.0125,
        observed_at=256,
        forecast=Forecast(
            *(256, 1280, (), 0.25, 0.125, 700, 2.5e-05, "One tensor will stall.", 0.05),
            course=((256, 0.58, 1.0), (1280, 0.03, 0.1)),
        ),
        divergence=Divergence(
            *(256, 0.0234, 0.0012, 3.25, 1.5, 0.25, 2.75),
            signs=(Sign("weights", True, "the weights have grown by 40%", ("emb.weight",)),),
        ),
    )
