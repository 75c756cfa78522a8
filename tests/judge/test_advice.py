"""The sentences, whole."""

from __future__ import annotations

import re

import pytest

from update_watch import wording
from update_watch.judge import reasons
from update_watch.judge.advice import advise, brief, finding, say
from update_watch.judge.seen import Seen
from update_watch.report import Cause

SENTENCES = [
    pytest.param(
        Cause.weight_rounding,
        Seen(dtype="bfloat16", efficiency=0.0, lost=1.0, lr=1e-5, critical_lr=2.8e-3),
        "BF16 weights without an FP32 master round the updates away (efficiency 0.00, 100% lost); keep FP32 master"
        " weights (model.float() and torch.autocast) or use stochastic rounding (torchao) or Kahan summation (optimi), or keep"
        " the"
        " learning rate above 0.0028 (now 1e-05), below which half of the updates are lost; either repair raises the"
        " effective learning rate, so retune it.",
        id="weight_rounding",
    ),
    pytest.param(
        Cause.weight_rounding,
        Seen(dtype="float16", efficiency=0.42, lost=0.613),
        "FP16 weights without an FP32 master round the updates away (efficiency 0.42, 61% lost); keep FP32 master"
        " weights (model.float() and torch.autocast) or use stochastic rounding (torchao) or Kahan summation (optimi); either"
        " repair"
        " raises the effective learning rate, so retune it.",
        id="weight_rounding-fp16",
    ),
    pytest.param(
        Cause.weight_rounding,
        Seen(dtype="float32", efficiency=0.03, lost=0.998, lr=1e-8, critical_lr=4e-8),
        "FP32 weights round the updates away (efficiency 0.03, over 99% lost); keep the learning rate above 4e-08 (now"
        " 1e-08), below which half of the updates are lost.",
        id="weight_rounding-fp32",
    ),
    pytest.param(
        Cause.weight_rounding,
        Seen(dtype="float32", efficiency=0.0, lost=1.0, lr=1e-8),
        "FP32 weights round the updates away (efficiency 0.00, 100% lost); raise the learning rate (now 1e-08).",
        id="weight_rounding-fp32-no-critical-lr",
    ),
    pytest.param(
        Cause.weight_rounding,
        Seen(dtype="bfloat16", efficiency=0.87, displacement=0.41, lost=0.3),
        "BF16 weights round the drift away: 0.41 of the summed update arrived, although single steps look well"
        " (efficiency 0.87); keep FP32 master weights (model.float() and torch.autocast) or use stochastic rounding (torchao) or"
        " Kahan summation (optimi); either repair raises the effective learning rate, so retune it.",
        id="weight_rounding-drift",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="exp_avg_sq", efficiency=0.0, rate=0.001),
        "Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001 (efficiency of the decay 0.00),"
        " so it can grow but not shrink; keep the optimizer state in FP32 or use a beta of at most 0.9961.",
        id="state_rounding-early",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="exp_avg_sq", efficiency=0.02, rate=0.001, is_growth=True),
        "Optimizer state exp_avg_sq in BF16 rounds its growth away at 1 - beta = 0.001 (efficiency of the growth 0.02);"
        " keep the optimizer state in FP32 or use a beta of at most 0.9961.",
        id="state_rounding-growth",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(
            dtype="bfloat16", accumulator="sum", efficiency=0.24, rate=0.0, is_growth=True
        ),  # of Adagrad: it has no beta
        "Optimizer state sum in BF16 rounds its growth away (efficiency of the growth 0.24); keep the optimizer state in FP32.",
        id="state_rounding-sum",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="exp_avg_sq", efficiency=0.0, rate=0.001, state_factor=0.45),
        "Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001 (efficiency of the decay 0.00),"
        " and the updates are 0.45 of what FP32 state would give; keep the optimizer state in FP32 or use a beta of at"
        " most 0.9961; that multiplies the effective learning rate by about 2.2, so retune it.",
        id="state_rounding-factor",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="exp_avg_sq", efficiency=0.0, rate=0.001, state_factor=0.97),
        "Optimizer state exp_avg_sq in BF16 rounds its decay away at 1 - beta = 0.001 (efficiency of the decay 0.00),"
        " so it can grow but not shrink (so far the updates are 0.97 of what FP32 state would give); keep the optimizer"
        " state in FP32 or use a beta of at most 0.9961.",
        id="state_rounding-so-far",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(state_factor=1.8),
        "The optimizer state has lost part of what it should hold to rounding, and the updates are 1.80 of what FP32"
        " state would give; keep the optimizer state in FP32; that multiplies the effective learning rate by about"
        " 0.56,"
        " so retune it.",
        id="state_rounding-nobody-blamed",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="step", counter=256.0),
        "Optimizer state step in BF16 has stopped at 256, where adding 1 changes nothing; keep the step counter in"
        " FP32.",
        id="state_rounding-counter",
    ),
    pytest.param(
        Cause.state_rounding,
        Seen(dtype="bfloat16", accumulator="step", counter=256.0, state_factor=0.5),
        "Optimizer state step in BF16 has stopped at 256, where adding 1 changes nothing, and the updates are 0.50 of"
        " what FP32 state would give; keep the step counter in FP32; that multiplies the effective learning rate by"
        " about 2, so retune it.",
        id="state_rounding-counter-factor",
    ),
    pytest.param(
        Cause.decay_rounding,
        Seen(dtype="bfloat16", efficiency=0.0, lost=1.0, decay_rate=1e-5, options=("fused", "foreach")),
        "Weight decay (lr * weight_decay = 1e-05 per step) is lost in BF16 weights (efficiency 0.00, 100% lost); keep"
        " FP32 master weights (model.float() and torch.autocast), or use stochastic rounding, or fused=True, which adds decay and"
        " gradient in one rounding; the decay then starts to act.",
        id="decay_rounding",
    ),
    pytest.param(
        Cause.average_rounding,
        Seen(dtype="bfloat16", accumulator="average:ema", efficiency=0.0, lost=1.0, rate=0.001),
        "The average 'ema' in BF16 does not follow the weights at 1 - decay = 0.001 (efficiency 0.00, 100% lost); keep"
        " the averaged model in FP32 (make it from model.float() or convert it after copying).",
        id="average_rounding",
    ),
    pytest.param(
        Cause.average_rounding,
        Seen(
            dtype="float32", accumulator="average:ema", efficiency=0.2, reason="rounded to BF16 by the validation swap"
        ),
        "The average 'ema' is rounded to BF16 by the validation swap (efficiency 0.20); validate an FP32 copy of the"
        " averaged model, or train with FP32 weights (model.float() and torch.autocast).",
        id="average_rounding-note",
    ),
    pytest.param(
        Cause.accumulation_rounding,
        Seen(dtype="bfloat16", accumulator="grad", efficiency=0.41, lost=0.66),
        "Gradients summed in BF16 lose micro-batches (efficiency 0.41, 66% lost); accumulate gradients in FP32"
        " (model.float() and torch.autocast), or use fewer and larger micro-batches; the summed gradient then grows.",
        id="accumulation_rounding",
    ),
    pytest.param(
        Cause.requires_grad_off,
        Seen(),
        "It is frozen: requires_grad is False; to train it, set requires_grad=True and give it to an optimizer.",
        id="requires_grad_off",
    ),
    pytest.param(
        Cause.not_in_optimizer,
        Seen(),
        "It requires a gradient, but no optimizer holds it; add it to a parameter group, or set requires_grad=False if"
        " it should stay as it is.",
        id="not_in_optimizer",
    ),
    pytest.param(
        Cause.no_gradient,
        Seen(steps=128),
        "Its gradient was None in all 128 steps that were looked at; check that forward uses it and that nothing detaches it"
        " from the loss.",
        id="no_gradient",
    ),
    pytest.param(
        Cause.zero_gradient,
        Seen(steps=1),
        "All its sampled gradients were 0 in every step; check for dead activations, a mask, a zero in"
        " front of it, or (an embedding) rows that no token uses.",
        id="zero_gradient",
    ),
    pytest.param(
        Cause.zero_learning_rate,
        Seen(steps=128),
        "Its learning rate was 0 in all 128 steps of this window; check the schedule and its parameter group.",
        id="zero_learning_rate",
    ),
    pytest.param(
        Cause.zero_learning_rate,
        Seen(lr=6e-9, peak_lr=1e-3),
        "Its learning rate of 6e-09 has all but run out (peak 0.001); if training should go on, check the schedule.",
        id="zero_learning_rate-run-out",
    ),
    pytest.param(
        Cause.skipped_steps,
        Seen(skipped=127, steps=128),
        "The gradient scaler skipped 127 of 128 steps, and so in the windows before; look for NaN or overflow in the"
        " loss, clip the gradients, or use BF16, which needs no scaler.",
        id="skipped_steps",
    ),
    pytest.param(
        Cause.not_written,
        Seen(dtype="bfloat16", efficiency=0.0, lost=1.0, headroom=0.96, options=("fused=True", "foreach")),
        "96% of its updates are at least four times what BF16 can store, yet the optimizer does not write them"
        " (efficiency 0.00, 100% lost); this is not rounding but a fault of the optimizer: use another implementation"
        " (fused=False) or another version.",
        id="not_written",
    ),
    pytest.param(
        Cause.non_finite,
        Seen(),
        "NaN or infinity among its weights, gradients or updates; go back to a checkpoint from before and lower the"
        " learning rate, clip the gradients, or look for log(0) and overflow.",
        id="non_finite",
    ),
    pytest.param(
        Cause.replicas_differ,
        Seen(),
        "Its stored values differ between ranks that should hold the same; these ranks train different models: check"
        " that all load the same checkpoint, that its gradient is reduced over all of them, and that nothing writes to"
        " it on one rank only.",
        id="replicas_differ",
    ),
    pytest.param(
        Cause.overwritten,
        Seen(net=0.02, written_step=127),
        "What its steps apply is overwritten before the next step, last after step 127: 2% of the intended update is left"
        " at the end; find what writes to it between steps: averaged weights that stay in the model after a validation, a"
        " checkpoint or a copy that is loaded again and again, a rounding to a coarser grid.",
        id="overwritten",
    ),
    pytest.param(
        Cause.not_copied_back,
        Seen(net=0.0),
        "Its optimizer steps a copy of it, and the copy is not written back to the model (net efficiency 0.00); copy the"
        " master weights to the model after every step, or give the model's own parameters to the optimizer.",
        id="not_copied_back",
    ),
    pytest.param(
        Cause.average_diverges,
        Seen(accumulator="average:ema", efficiency=-1.0, lost=0.0),
        "The average 'ema' moves away from the weights (efficiency -1.00, 0% lost); check its update: average = decay *"
        " average + (1 - decay) * weight; a sign or the order of the two is wrong.",
        id="average_diverges",
    ),
    pytest.param(
        Cause.average_not_updated,
        Seen(accumulator="average:ema", steps=96),
        "The average 'ema' was not updated in 96 steps in which its weights moved; call its update after the step (if it is to"
        " begin later, as SWA does, nothing is wrong), and check that the averaged copy is the one that was given to the watch.",
        id="average_not_updated",
    ),
    pytest.param(
        Cause.negligible_gradient,
        Seen(gradient=2.1e-9),
        "Its gradient is at the level of round-off (largest 2.1e-09), far below what the rule needs for a real update: no signal reaches it;"
        " look for what cancels its gradient, such as a softmax over a single choice; more precision changes nothing.",
        id="negligible_gradient",
    ),
    pytest.param(
        Cause.not_replayable,
        Seen(reason="the optimizer overwrites its gradient"),
        "Unknown, because the optimizer overwrites its gradient.",
        id="not_replayable",
    ),
]


@pytest.mark.parametrize(("cause", "seen", "text"), SENTENCES)
def test_a_cause_says(cause: Cause, seen: Seen, text: str) -> None:
    assert say(cause, seen) == text


def test_every_cause_has_a_sentence_tested_here() -> None:
    assert {param.values[0] for param in SENTENCES} == set(Cause)
    assert all("_" not in wording.cause_label(cause) for cause in Cause)


@pytest.mark.parametrize("cause", list(Cause))
def test_a_cause_of_which_nothing_else_is_known_still_makes_one_sentence(cause: Cause) -> None:
    text = say(cause, Seen())
    assert text.endswith(".") and not text.endswith("..")
    assert "None" not in text.replace("was None", "") and "nan" not in text


def test_a_headline_leaves_out_the_caution_and_a_list_the_cure() -> None:
    text = say(Cause.decay_rounding, Seen(dtype="bfloat16", efficiency=0.0))
    assert brief(text) == (
        "Weight decay is lost in BF16 weights (efficiency 0.00); keep FP32 master weights (model.float() and torch.autocast), or"
        " use stochastic rounding"
    )
    assert finding(text) == "Weight decay is lost in BF16 weights (efficiency 0.00)."


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        (reasons.not_measured(0), "its optimizer took no step in this window"),
        (reasons.not_measured(1), "it was measured in none of the optimizer steps of this window"),
        (reasons.too_few_steps(4, 6), "only 4 of the 6 measured steps a verdict needs were seen so far"),
        (reasons.too_few_steps(1, 6), "only 1 of the 6 measured steps a verdict needs was seen so far"),
        (reasons.one_window(), "one window alone may mislead about it; the next one decides"),
        (
            reasons.too_noisy(0.7, 0.25, 3),
            (
                "its efficiency of 0.70 has a standard error of 0.25 after 3 windows; windows are pooled until that"
                " is small"
                " enough"
            ),
        ),
        (
            reasons.too_small(),
            (
                "so few of its stored values are expected to change at this learning rate that none changing means"
                " nothing;"
                " windows are pooled until enough are"
            ),
        ),
        (
            reasons.finer_than_fp32(),
            "its updates are finer than FP32, in which samples are compared; FP64 weights hold them",
        ),
        (
            reasons.remainder_unclear(0.12),
            (
                "its stored value took 0.12 of the update, but FP32 weights or a compensation kept elsewhere may"
                " hold the"
                " rest, and the sum over the window is still too small to tell; a longer window would"
            ),
        ),
        (
            reasons.rising_lr(2e-5),
            "the learning rate has just risen threefold or more, to 2e-05: too early to call its lost updates a stall",
        ),
        (
            reasons.unexplained(0.3, 0.002),
            (
                "it moved by 0.30 of the intended update although under 1% of its updates were lost, which rounding"
                " does not explain: something else writes to it, or the optimizer's rule was not replayed rightly"
            ),
        ),
        (
            reasons.overflow(3, 128),
            "the gradient scaler skipped 3 of 128 steps of this window, where gradients overflow",
        ),
    ],
)
def test_a_reason_not_to_know_says(reason: str, text: str) -> None:
    assert reason == text
    assert reasons.why(reasons.unknown(reason)) == reason


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.0, "0%"),
        (0.001, "under 1%"),
        (0.5, "50%"),
        (0.994, "99%"),
        (0.999, "over 99%"),
        (0.9999, "over 99%"),
        (0.99998, "100%"),
        (1.0, "100%"),
    ],
)
def test_a_percentage_is_0_or_100_only_when_it_is(share: float, text: str) -> None:
    assert wording.percent(share) == text


def test_a_small_negative_number_is_not_minus_nought() -> None:
    assert wording.fixed(-0.001) == "0.00"


OPTION = re.compile(r"\b(fused|foreach|kahan_sum)=|\bbeta\b(?! = )")  # "1 - beta = 0.001" was measured
LOW = Seen(dtype="bfloat16", efficiency=0.0, lost=1.0, accumulator="sum", headroom=0.9)


@pytest.mark.parametrize("cause", list(Cause))
def test_no_option_is_named_that_the_optimizer_does_not_have(cause: Cause) -> None:
    assert not OPTION.search(advise(cause, LOW).cure)
    used = ("fused=True", "kahan_sum=True")  # and none that is on is told to be turned on
    assert not re.search(r"(fused|kahan_sum)=True", advise(cause, LOW._replace(options=used)).cure)


@pytest.mark.parametrize(
    ("cause", "option", "words"),
    [
        (Cause.weight_rounding, "kahan_sum", "kahan_sum=True"),
        (Cause.decay_rounding, "fused", "fused=True"),
        (Cause.not_written, "fused=True", "fused=False"),
        (Cause.not_written, "foreach", "foreach=True"),
        (Cause.state_rounding, "beta2", "beta of at most"),
    ],
)
def test_an_option_that_it_has_is_named(cause: Cause, option: str, words: str) -> None:
    assert words in advise(cause, LOW._replace(options=(option,))).cure
