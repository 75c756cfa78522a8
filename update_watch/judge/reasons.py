"""Why a health is `unknown`: one sentence per reason."""

from __future__ import annotations

from update_watch.wording import fixed, number, percent, plural

_UNKNOWN = "Unknown, because "


def unknown(reason: str) -> str:
    """The sentence for a health that is not known."""
    return f"{_UNKNOWN}{reason}."


def why(text: str) -> str:
    """The reason in such a sentence."""
    return text.removeprefix(_UNKNOWN).rstrip(".")


def not_measured(steps: int) -> str:
    if not steps:
        return "its optimizer took no step in this window"
    return "it was measured in none of the optimizer steps of this window"


def no_step(why_not: str, moved: float | None) -> str:
    """`why_not`: what was seen instead of a step; `moved`: by what share of its size it moved all the same."""
    if not why_not or moved is None:
        return why_not or not_measured(0)
    return f"{why_not}; " + (
        f"it moved by {percent(moved)} of its size" if moved else "not one sampled bit of it has moved"
    )


def too_few_steps(seen: int, needed: int) -> str:
    return f"only {seen} of the {needed} measured steps a verdict needs {'was' if seen == 1 else 'were'} seen so far"


def too_few_looks(looks: int, needed: int) -> str:
    return (
        f"its gradient was 0 in {'the one step' if looks == 1 else f'all {looks} steps'} in which it was looked at, and"
        f" {needed} are needed to say that none arrives"
    )


def not_always_looked_at(looks: int, blind: int) -> str:
    return (
        f"its gradient was 0 in {'the one step' if looks == 1 else f'all {looks} steps'} in which it was looked at; of the other"
        f" {blind} of the window nothing is known, and from now on all are looked at"
    )


def moved_unseen(looked: int, steps: int) -> str:
    return f"it had no gradient in the {looked} of {steps} steps that were looked at, and moved in the others"


def rate_ran_out(lr: float, peak: float) -> str:
    return (
        f"its learning rate of {number(lr)} has all but run out (peak {number(peak)}): what is lost at the end of a"
        " schedule is no stall, though it still moves"
    )


def faster_than_said(efficiency: float) -> str:
    return (
        f"it moved by {fixed(efficiency)} times what its decay says: give the decay that it really has, or its owner's"
        " object, which tells it"
    )


def one_window() -> str:
    return "one window alone may mislead about it; the next one decides"


def too_noisy(efficiency: float, error: float, windows: int) -> str:
    return (
        f"its efficiency of {fixed(efficiency)} has a standard error of {fixed(error)} after"
        f" {plural(windows, 'window')}; windows are pooled until that is small enough"
    )


def too_small() -> str:
    return (
        "so few of its stored values are expected to change at this learning rate that none changing means nothing;"
        " windows are pooled until enough are"
    )


def finer_than_fp32() -> str:
    return "its updates are finer than FP32, in which samples are compared; FP64 weights hold them"


def remainder_unclear(efficiency: float) -> str:
    return (
        f"its stored value took {fixed(efficiency)} of the update, but FP32 weights or a compensation kept elsewhere"
        " may hold the rest, and the sum over the window is still too small to tell; a longer window would"
    )


def set_to_zero() -> str:
    return (
        "all elements of it that were read are set to exactly 0 again after some steps, as pruning does, and what else is"
        " stored is too little to tell whether others train"
    )


def may_be_taken_back(undone: float, dtype: str) -> str:
    """`undone`: share of what was applied."""
    return (
        f"{percent(undone)} of what its steps apply is taken back from time to time, and the gaps of {dtype} hide whether it is the"
        " same share of each element, as Lookahead takes it, or whether an average is left in the model"
    )


def held_at_a_bound() -> str:
    return (
        "all elements of it that were read are put back to 0 or in one direction, as a bound does that they are clipped to, or a"
        " normalisation of rows of one element, or a copy that is loaded again and again"
    )


def on_a_grid(net: float, error: float) -> str:
    """`net`: net efficiency; `error`: its standard error."""
    return (
        "what its steps apply is put back to the bit in most elements that were read, as rounding to a coarser grid does, and how"
        f" much of it is left is not known well enough: {fixed(net)}, standard error {fixed(error)}"
    )


def few_with_gradients(zeros: float | None) -> str:
    """`zeros`: share of its gradients that are 0."""
    return (
        f"what its steps apply is put back before the next where it was read, but {percent(zeros or 0.0)} of its gradients"
        " are 0, and those few elements that have one may be left alone, as textual inversion does"
    )


def was_put_back() -> str:
    return "where it was read, what its steps apply was put back before; in this window nothing was seen of it"


def no_signal(ratio: float) -> str:
    """`ratio`: of its gradients to those of the run's other tensors."""
    return (
        f"its gradients are {number(ratio)} of the size of the others', as what rounding leaves where a gradient cancels, and its"
        " rule makes full steps of whatever they are: look for what cancels its gradient, such as a softmax over a single"
        " choice; more precision changes nothing"
    )


def rising_lr(lr: float) -> str:
    return (
        f"the learning rate has just risen threefold or more, to {number(lr)}: too early to call its lost updates a"
        " stall"
    )


def unexplained(efficiency: float, lost: float | None) -> str:
    kept = f" although {percent(lost)} of its updates were lost" if lost is not None else ""
    return (
        f"it moved by {fixed(efficiency)} of the intended update{kept}, which rounding does not explain: something else"
        " writes to it, or the optimizer's rule was not replayed rightly"
    )


def overflow(skipped: int, steps: int) -> str:
    if not steps:
        return (
            f"gradients held NaN or infinity, and no step followed {skipped} backward passes of them: they are skipped"
        )
    return f"the gradient scaler skipped {skipped} of {steps} steps of this window, where gradients overflow"


def was_rounded(step: int) -> str:
    """Of FP32 weights that held BF16 values only. No reason why something is unknown, but what became of them before."""
    return (
        f"Before step {step} all FP32 values were values of BF16, as after a load or a resume through BF16; what that"
        " rounded away is lost, from here on training goes on in FP32."
    )
