"""How an optimizer's updates can be replayed, found out by trying it on a small synthetic training.

Three ways are tried, the cheapest first: on samples as one vector, on samples as a matrix, on whole tensors. Where none of
them is right in FP32, the same three are tried on scaled weights in their own format (`scaled_trial`); then those in FP32
again without the first step, in which a rule may set up what it goes by; then all whole tensors together. Before
every synthetic step a replay is made, after it the two are compared. The first way that is always right is the rule's
kind. If none is, nothing may be said about this optimizer's updates, and the reason is kept. Nothing is guessed from
names, and the real optimizer is not touched.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple

import torch
from torch.optim import Optimizer

from update_watch import formats
from update_watch.replay import kept_states
from update_watch.replay.absent import AbsentError, CopySteppedError, ReplayError
from update_watch.replay.premade_state import made_before, premade_state
from update_watch.replay.replay_trial import STEPS, TOLERANCE, ReplayTrial, Way, refuse_marks
from update_watch.replay.rounding_scheme import Scheme
from update_watch.replay.rule import Kind, Rule
from update_watch.replay.scaled_trial import try_scaled
from update_watch.replay.side_effects import WithoutEffects, silence
from update_watch.replay.synthetic_training import (
    RuleError,
    SyntheticTraining,
    TrainingSettings,
    mimic,
    resolving,
    small,
    uncounted,
)
from update_watch.replay.twin import Twin
from update_watch.wording import first_line

_STEPS_SMALL = 6
_FEW = 256  # elements
_KINDS = {Way.whole: Kind.whole, Way.together: Kind.together}  # of others: elementwise
_ALONE = (Way.flat, Way.rows, Way.whole)  # a tensor without the others
_TINY_GRADIENT = 1e-5  # scale at which decay, epsilons and averages over tensors show
_TYPICAL: dict[int, tuple[int, ...]] = {0: (1,), 1: (4096,), 2: (128, 128), 3: (32, 16, 32), 4: (32, 32, 3, 3)}


def find_rule(
    optimizer: Optimizer,
    group: int,
    ndim: int,
    *,
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Rule:
    """Find out how parameters of `optimizer.param_groups[group]` can be replayed.

    Args:
        ndim: number of dimensions of the parameters.
        shape: their shape; without it a typical one, which may be on the other side of a limit the rule has
            (factored from 128 columns). Shapes of the same `synthetic_training.mimic` have the same rule.
        dtype: their format. Rules that are bound to one below FP32 are tried in it.

    Costs 10 to 40 ms for torch's optimizers, and 0.2 s for a rule that is bound to a low-precision format. Random states,
    parameters and optimizer state stay untouched. A rule that needs what its optimizer keeps per parameter in attributes is
    tried with these as states.
    """
    shape = _TYPICAL[min(ndim, 4)] if shape is None else tuple(shape)
    rule = _find_rule(optimizer, group, shape, dtype)
    if not rule.has_failed or not kept_states.adopt(optimizer):
        return rule
    with_kept = _find_rule(optimizer, group, shape, dtype)
    if with_kept.kind is Kind.unknown and not with_kept.steps_copy:
        kept_states.let_go(optimizer)
        return rule
    return with_kept


def _find_rule(optimizer: Optimizer, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> Rule:
    reasons: list[str] = []
    has_failed = steps_copy = False
    for device in dict.fromkeys((torch.device("cpu"), _device(optimizer, group))):
        settings = TrainingSettings(optimizer, group, small(shape), device, premade=premade_state(optimizer, group))
        low = settings._replace(dtype=dtype) if dtype in formats.HALVES else None
        quiet = WithoutEffects(device)
        with quiet, quiet, silence():
            found = _tried(optimizer, settings, low, shape)
        if isinstance(found, Rule):
            return found
        reasons += found.reasons
        has_failed |= found.has_failed
        steps_copy |= found.steps_copy
    first, *others = dict.fromkeys(reasons)
    scaled = others[:1] if low and not steps_copy else []
    reason = first + "".join(f"; and in its own format {other}" for other in scaled)
    return Rule(Kind.unknown, reason, has_failed=has_failed, steps_copy=steps_copy)


class _Failed(NamedTuple):
    reasons: list[str]
    has_failed: bool  # when it was run, and not in what it did
    steps_copy: bool


def _tried(
    optimizer: Optimizer, settings: TrainingSettings, low: TrainingSettings | None, shape: tuple[int, ...]
) -> Rule | _Failed:
    """In FP32, then on scaled weights. Called as the one line of a `with`: an interrupt between the lines of one may be
    past its exits.
    """
    reasons: list[str] = []
    has_failed = has_run = steps_copy = False

    def found(rule: Rule) -> Rule:
        return rule if low is None else dataclasses.replace(rule, low_states=_states_of(low) - rule.forms.keys())

    try:
        Twin(optimizer)
        refuse_marks(low or settings)
        has_run = True
        return found(_find(settings, shape))
    except ReplayError as error:
        has_failed = isinstance(error, (AbsentError, RuleError))
        steps_copy = isinstance(error, CopySteppedError)
        reasons.append(str(error))
    except Exception as error:  # the optimizer holds what nobody could foresee
        has_failed = True
        reasons.append(_untried(optimizer, error))
    if low is not None:
        try:
            return _find_scaled(low, shape)
        except ReplayError as error:
            reasons.append(str(error))
    if has_run and not has_failed:
        # numbers over all tensors: found in the first step and kept in the group, or anew in each
        for others, ways in ((settings._replace(skips_first=True), _ALONE), (settings, (Way.together,))):
            with suppress(Exception):  # it stays unknown for the first reason
                return found(_find(others, shape, ways))
    return _Failed(reasons, has_failed, steps_copy)


def find_scaled_rule(optimizer: Optimizer, group: int, shape: tuple[int, ...], dtype: torch.dtype) -> Rule:
    """The same on scaled weights alone: for rules that keep other states for `dtype` than in FP32."""
    quiet = WithoutEffects(torch.device("cpu"))
    settings = TrainingSettings(optimizer, group, small(shape), torch.device("cpu"), dtype=dtype)
    with quiet, quiet, silence():
        found = _scaled_or_unknown(settings, shape)
    return found


def _scaled_or_unknown(settings: TrainingSettings, shape: tuple[int, ...]) -> Rule:
    try:
        return _find_scaled(settings, shape)
    except ReplayError as error:
        return Rule(Kind.unknown, str(error))


def _states_of(settings: TrainingSettings) -> frozenset[str]:
    """Names of the states that the rule makes in this training."""
    training = SyntheticTraining(settings)
    with suppress(RuleError):
        for _ in range(2):
            training.set_gradients()
            training.step()
    return frozenset(training.forms())


def _find_scaled(settings: TrainingSettings, shape: tuple[int, ...]) -> Rule:
    """The first way that is right on scaled weights."""
    reason: ReplayError | None = None
    size_matters = False
    for way in _ALONE:
        if way is Way.rows and len(shape) < 2:
            continue
        try:
            found = try_scaled(settings, way)
            if way is not Way.whole or size_matters:
                size_matters = True
                found = try_scaled(settings._replace(shapes=mimic(shape)), way)
        except Exception as error:  # torch's own as well
            reason = error if isinstance(error, ReplayError) else ReplayError(_untried(settings.optimizer, error))
            continue
        scheme = found.scaled.scheme
        widens = way is not Way.whole and not found.element_states & found.scaled.state_dtypes.keys()
        if not scheme.carrier:
            scheme = Scheme("stochastic" if found.is_random else "carried" if found.is_kept_elsewhere else "plain")
        return Rule(
            _KINDS.get(way, Kind.elementwise),
            rows=way is Way.rows,
            element_states=found.element_states,
            forms=found.forms,
            exact_states=found.element_states if widens else frozenset(),
            widens=widens,
            scaled=dataclasses.replace(found.scaled, scheme=scheme),
            may_draw=found.is_random,
            apart=found.apart,
        )
    raise reason or ReplayError("nothing was tried")


def _find(settings: TrainingSettings, shape: tuple[int, ...], ways: tuple[Way, ...] = _ALONE) -> Rule:
    """What is right in trainings with all kinds of gradients; where the rule breaks on some, in gentle ones.

    Where it breaks for want of a state, with one like that which is there.
    """
    try:
        return _first_right(settings, shape, ways)
    except RuleError as error:
        if isinstance(error.__cause__, KeyError) and not settings.premade:
            made = made_before(settings.optimizer, settings.group)
            if made:
                return _find(settings._replace(premade=made), shape, ways)
        return _first_right(settings._replace(is_gentle=True), shape, ways)


def _first_right(settings: TrainingSettings, shape: tuple[int, ...], ways: tuple[Way, ...]) -> Rule:
    """The first way that is right in every training."""
    starts = _starts(settings)
    reason: ReplayError | None = None
    size_matters = False  # something is right on few elements that is not on many
    for way in ways:
        if way is Way.rows and len(shape) < 2:
            continue
        trials: list[ReplayTrial] = []
        try:
            for training, steps in _trainings(starts, way, shape, size_matters):
                trials.append(ReplayTrial(training, way))
                trials[-1].run(steps)
            trials[-1].refuse_rounded()
            trials[-1].refuse_unmoved()
            return _rule(way, trials, _kept_low(trials[-1]))
        except RuleError:
            raise
        except Exception as error:  # torch's own as well, of states that it cannot compute with
            reason = error if isinstance(error, ReplayError) else ReplayError(_untried(settings.optimizer, error))
            size_matters |= bool(trials) and trials[-1].settings.shapes == mimic(shape)
    raise reason or ReplayError(f"{type(settings.optimizer).__name__} has no parameter to be tried on")


def _untried(optimizer: Optimizer, error: Exception) -> str:
    return f"the rule of {type(optimizer).__name__} cannot be tried: {first_line(error)}"


def _starts(settings: TrainingSettings) -> list[TrainingSettings]:
    """With the group's counters at their start, and as they are now if that differs and the rule runs with them.

    Raises `RuleError` when it runs with neither.
    """
    candidates = [settings]
    problem: RuleError | None = None
    try:
        fresh = uncounted(settings)
        candidates = [fresh, settings] if fresh.instead else candidates
    except RuleError as error:
        problem = error
    starts = []
    for candidate in candidates:
        try:
            starts.append(resolving(candidate))
        except RuleError as error:
            problem = error
    if not starts:
        raise problem or RuleError()
    return starts


def _trainings(
    starts: list[TrainingSettings], way: Way, shape: tuple[int, ...], size_matters: bool
) -> Iterator[tuple[TrainingSettings, int]]:
    """Worlds and the steps to run in them, the cheap ones first; the last one is the most like the parameter."""
    for start in starts:
        yield resolving(start._replace(gradient=_TINY_GRADIENT, lr_factor=1.0)), _STEPS_SMALL
        if math.prod(shape) < _FEW:
            # a few elements show little: what is said of them has to hold for a parameter of some size as well
            yield start._replace(shapes=small(_TYPICAL[min(len(shape), 4)])), STEPS
        if way in _KINDS:
            yield start, STEPS
            if size_matters:
                yield start._replace(shapes=mimic(shape)), STEPS
        else:
            yield start, _STEPS_SMALL
            yield start._replace(shapes=mimic(shape)), STEPS


def _kept_low(trial: ReplayTrial) -> frozenset[str]:
    """States of low precision, if there are any that cannot be replayed in FP32."""
    low = trial.low_states()
    if not low:
        return low
    try:
        ReplayTrial(trial.settings, trial.way, widen=True).run(_STEPS_SMALL)
    except ReplayError:
        if trial.way not in _KINDS:
            raise
        return low
    return frozenset()


def _rule(way: Way, trials: list[ReplayTrial], low_kept: frozenset[str]) -> Rule:
    """What holds in all trainings."""
    forms: dict[str, str] = {}
    for trial in trials:
        forms.update({name: form for name, form in trial.forms.items() if form != "none" or name not in forms})
    elements = {n for n in forms if {t.forms.get(n, "none") for t in trials} - {"none"} == {"element"}}
    exact = {n for n in elements if all(trial.state_errors.get(n, 0.0) <= TOLERANCE for trial in trials)}
    return Rule(
        _KINDS.get(way, Kind.elementwise),
        rows=way is Way.rows,
        element_states=frozenset(elements),
        error=max(trial.error for trial in trials),
        exact_states=frozenset(exact),
        forms=forms,
        widens=not low_kept,
        low_kept=low_kept,
        apart=any(trial.apart for trial in trials),
        is_bound_to_fp32=trials[-1].fails_in_fp64(),
        may_draw=any(trial.twin.has_drawn for trial in trials),
        skips_first=any(trial.skips_first for trial in trials),
    )


def _device(optimizer: Optimizer, group: int) -> torch.device:
    params = optimizer.param_groups[group]["params"]
    return params[0].device if params and params[0].device.type != "meta" else torch.device("cpu")
