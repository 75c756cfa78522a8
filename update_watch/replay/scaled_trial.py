"""Whether a rule may be replayed on scaled weights, and which state holds the rest of a weight: found out by trial.

A synthetic training in the weight's own format. Before each step a replay on scaled weights is made for every way in which a
state could complete the weight; after it, what the replay intended is compared with the rule's own drift. With updates as
large as the weights the two must agree to a rounding for any rule in which the weight acts through decay alone; with
updates below a gap they agree only if what rounding took was found in the right state. Replays with another factor 2^-k
must agree as well. A rule that throws dice rounds the same element, met twice, to different sides.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Collection
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from update_watch import formats
from update_watch.replay.absent import ReplayError
from update_watch.replay.replay_trial import STEPS, Way, alike, is_element
from update_watch.replay.rounding_scheme import Scheme, ways_to_join
from update_watch.replay.scaled_weights import ScaledWeights, exponent_of
from update_watch.replay.synthetic_training import RuleError, SyntheticTraining, TrainingSettings, sampled
from update_watch.replay.twin import Run, Twin

_SECONDS = 1.0  # for one training
_LARGE = 0.25  # of the weights' rms: updates that any rounding lets pass
_SMALL = 2.0**-9  # updates below a gap: only what is kept shows
_OFF = 2.0**-6  # of an update: some roundings in a format of 8 bits
_GAPS = 3.0  # by which a rounded or diced weight may be off
_KEPT_GAPS = 0.06  # the same of a weight and what completes it
_DECAY = 5.0  # makes decay as large as the gradient's part
_HELD_BACK = 0.4  # of a gap: updates that rounding to nearest never lets pass
_STRAYS = 0.1  # share of elements that may end elsewhere
_FEW = 8  # steps
# learning rates at which decay may show where there is no gradient, and the share of a weight that is enough
_FASTER, _RATES, _SHOWS = 8.0, 8, 0.05
_COMPARED = (0, 1, 3)  # steps with a second factor


@dataclasses.dataclass
class Found:
    """What the trials of one way have shown."""

    scaled: ScaledWeights  # with FP32 states where the rule takes them
    element_states: frozenset[str]
    forms: dict[str, str]
    is_random: bool
    is_kept_elsewhere: bool
    apart: bool


def try_scaled(settings: TrainingSettings, way: Way) -> Found:
    """The way in which replays on scaled weights are right. Raises `ReplayError` when there is none, with the reason."""
    exponent = exponent_of(settings.dtype)
    large, small = _sized(settings)
    small = _decaying(small, 0.0) or small  # many rules round decay on its own, whatever they keep of the rest
    candidates, dtypes, others = _candidates(small, way)
    decays = ("weight_decay",) if "weight_decay" in settings.optimizer.param_groups[settings.group] else ()
    shrinking = _shrinking(large)
    problem: ReplayError | None = None
    for scheme in candidates:
        scaled = ScaledWeights(settings.dtype, exponent, scheme, decays, dtypes, others)
        try:
            # the telling ones first: most candidates fail there
            trials = [ScaledTrial(small, way, scaled, keeps_gaps=not scheme.carrier)]
            trials += [ScaledTrial(training, way, scaled) for training in (_decaying(large, _DECAY), large) if training]
            for trial, steps in zip(trials, (_FEW, *[_FEW] * (len(trials) - 2), STEPS), strict=True):
                trial.run(steps)
            if shrinking is not None:
                scaled = _decayed(shrinking, way, scaled)
        except RuleError:
            raise
        except ReplayError as error:
            problem = problem or error
            continue
        forms: dict[str, str] = {}
        for trial in trials:
            forms.update(trial.forms)
        elements = {name for name, form in forms.items() if form == "element"} - {scheme.carrier}
        return Found(
            _widened(scaled, elements, large, way) or scaled,
            frozenset(elements),
            {name: form for name, form in forms.items() if name != scheme.carrier},
            any(trial.is_random for trial in trials),
            trials[0].comes_later,
            any(trial.apart for trial in trials),
        )
    raise problem or ReplayError("nothing was tried")


def _widened(scaled: ScaledWeights, names: set[str], training: TrainingSettings, way: Way) -> ScaledWeights | None:
    """The same with states in FP32, if the rule runs with them and leaves the same states; None if it does not.

    A state that follows the weight, as an average of it, is another one on scaled weights.
    """
    if way is Way.whole:  # these are replayed with their states as they are
        return None
    wide = dataclasses.replace(scaled, state_dtypes={n: d for n, d in scaled.state_dtypes.items() if n not in names})
    try:
        ScaledTrial(training, way, wide, states=names).run(_FEW)
    except ReplayError:
        return None
    return wide


def _sized(settings: TrainingSettings) -> tuple[TrainingSettings, TrainingSettings]:
    """The settings with updates as large as the weights, and with updates below their gaps."""
    factor = 1.0
    for _ in range(12):
        training = SyntheticTraining(settings._replace(lr_factor=factor))
        before = [p.detach().float() for p in training.params]
        for _ in range(2):
            training.set_gradients()
            training.step()
        # the middle of all elements: a few of a rule like SGD's move much further
        sizes = [
            float((p.detach().float() - b).abs().median() / b.square().mean().sqrt())
            for p, b in zip(training.params, before, strict=True)
        ]
        size = max(sizes)
        if _LARGE / 2 <= size <= 4 * _LARGE:
            large = settings._replace(lr_factor=factor)
            return large, settings._replace(lr_factor=factor * _SMALL / size)
        factor *= 64.0 if size < 0.02 else _LARGE / size
    raise ReplayError(f"no learning rate was found at which {type(settings.optimizer).__name__} moves its weights")


def _decaying(settings: TrainingSettings, decay: float) -> TrainingSettings | None:
    """The settings with another weight decay, if there is any."""
    present = settings.optimizer.param_groups[settings.group].get("weight_decay")
    if isinstance(present, (int, float)) and not isinstance(present, bool):
        return settings._replace(instead={**settings.instead, "weight_decay": decay})
    return None


def _shrinking(settings: TrainingSettings) -> TrainingSettings | None:
    """The settings without gradients, at a learning rate at which the rule's decay is large; None where weights stay as they are."""
    for power in range(_RATES):
        still = settings._replace(gradient=0.0, lr_factor=settings.lr_factor * _FASTER**power)
        training = SyntheticTraining(still)
        before = [p.detach().float() for p in training.params]
        training.set_gradients()
        try:
            training.step()
        except RuleError:  # some divide by the gradient
            return None
        each = zip(training.params, before, strict=True)
        if any(bool((p.detach().float() - b).abs().median() > _SHOWS * b.abs().median()) for p, b in each):
            return still
    return None


def _decayed(settings: TrainingSettings, way: Way, scaled: ScaledWeights) -> ScaledWeights:
    """With the setting of the group by which weights decay, whatever it is called. Raises `ReplayError` where there is none."""
    group = settings.optimizer.param_groups[settings.group]
    others = [(name,) for name, value in group.items() if type(value) is float and value and name != "lr"]
    for decays in (scaled.decays, *others):
        found = dataclasses.replace(scaled, decays=decays)
        with suppress(ReplayError):
            ScaledTrial(settings, way, found).run(2)
            return found
    raise ReplayError(f"{type(settings.optimizer).__name__} decays weights by what is no setting of their group")


def _candidates(settings: TrainingSettings, way: Way) -> tuple[list[Scheme], dict[str, torch.dtype], bool]:
    """How states could complete the weight, "not at all" last; the states' formats; whether there are several."""
    training = SyntheticTraining(settings)
    possible: dict[Scheme, None] = {}
    dtypes: dict[str, torch.dtype] = {}
    names: set[str] = set()
    for step in range(4):
        training.set_gradients()
        training.step()
        found: dict[Scheme, None] = {}
        for param, state in zip(training.params, training.states(), strict=True):
            names |= state.keys()
            for name, value in state.items():
                if type(value) is Tensor and value.shape == param.shape:
                    dtypes[name] = value.dtype
                    for join in ways_to_join(param.detach(), value, settings.dtype):
                        found[Scheme(f"carried:{name}", name, join)] = None
        possible = found if step == 0 else {scheme: None for scheme in possible | found}
    return [*possible, Scheme("plain")], dtypes, len(names) > 1


class ScaledTrial:
    """One training in the weight's own format, with a replay on scaled weights before each step."""

    def __init__(
        self,
        settings: TrainingSettings,
        way: Way,
        scaled: ScaledWeights,
        *,
        keeps_gaps: bool = True,
        states: Collection[str] = (),
    ) -> None:
        """`keeps_gaps`: the weight may be off by what rounding does to it. `states`: to be compared as well."""
        self._names = states
        self.training = SyntheticTraining(settings)
        self.way, self.scaled = way, scaled
        self.coarser = dataclasses.replace(scaled, exponent=scaled.exponent - 9)
        self.twin = Twin(self.training.optimizer)
        self.forms: dict[str, str] = {}
        self.is_random = self.apart = False
        self._gaps = _GAPS if keeps_gaps else _KEPT_GAPS
        fmt = formats.of(settings.dtype)
        assert fmt is not None
        self._format = fmt
        # updates that rounding to nearest never lets pass arrived after all, and not by chance
        self.comes_later = False

    def run(self, steps: int) -> None:
        """Train, replay, compare. Raises `ReplayError` when a replay fails or differs."""
        started = time.thread_time()
        meant: list[Tensor] = []
        first = self._weights()
        for step in range(steps):
            self.training.set_gradients()
            before = self._weights()
            try:
                torch.default_generator.manual_seed(step)  # not those of the step to come
                intended = self._replay(self.scaled)
                other = self._replay(self.coarser) if step in _COMPARED else intended
            except ReplayError:
                self.training.step()  # if the rule itself fails here, that is the reason
                raise
            torch.default_generator.manual_seed(1000 + step)
            self.training.step()
            self._note_forms()
            self._compare_states()
            meant.append(intended)
            self._compare(before, self._weights(), intended, other)
            if time.thread_time() - started > _SECONDS:
                break
        gap, total = self._format.ulp(first), torch.stack(meant).sum(0)
        held_back = (torch.stack(meant).abs().amax(0) < _HELD_BACK * gap) & (total.abs() > gap)
        strays = ((self._weights() - first - total).abs() > gap)[held_back]
        self.comes_later = not self.is_random and len(strays) > 0 and float(strays.float().mean()) < _STRAYS

    def _compare(self, before: Tensor, after: Tensor, intended: Tensor, other: Tensor) -> None:
        applied = after - before
        gap = self._format.ulp(torch.maximum(before.abs(), after.abs()))
        largest = intended.abs().amax()
        for seen, allowed in (
            (applied, self._gaps * gap + _OFF * intended.abs()),
            (other, 2 * _OFF * intended.abs() + _OFF / 4 * largest),
        ):
            off = (seen - intended).abs()
            if not bool((off <= allowed + 1e-30).all()):
                share = float(off.square().sum().sqrt() / intended.square().sum().sqrt().clamp_min(1e-30))
                raise ReplayError(
                    f"{self.training.name} replayed on scaled weights ({self.way.value}) differs from its own step by"
                    f" {share:.1e} of the update"
                )

    def _compare_states(self) -> None:
        for i, state in enumerate(self.training.states()):
            for name in self._names:
                stored, replayed = state.get(name), self._replayed[i].get(name)
                if not isinstance(stored, Tensor):
                    continue
                stored = sampled(stored, self.training.drawn[i]).float()
                if replayed is None or not bool(((replayed - stored).abs() <= _OFF * stored.abs().max()).all()):
                    raise ReplayError(f"{self.training.name} leaves another state '{name}' where it is kept in FP32")

    def _note_forms(self) -> None:
        for name, form in self.training.forms().items():
            known = self.forms.get(name, "none")
            self.forms[name] = form if known in (form, "none") else known if form == "none" else "other"

    def _weights(self) -> Tensor:
        """[2, samples]: FP32 weights, whole."""
        return torch.stack([self._whole(i) for i in range(len(self.training.params))])

    def _whole(self, i: int) -> Tensor:
        param, state, at = self.training.params[i], self.training.states()[i], self.training.drawn[i]
        name = self.scaled.scheme.carrier
        return self.scaled.whole(
            sampled(param, at), {name: sampled(state[name], at)} if state.get(name) is not None else {}
        )

    # --- replaying --------------------------------------------------------------------------------

    def _replay(self, scaled: ScaledWeights) -> Tensor:
        """[2, samples]: the intended changes of the step to come."""
        if self.way is Way.whole:
            return torch.stack([self._replay_whole(i, scaled) for i in range(len(self.training.params))])
        self._replayed: list[dict[str, Tensor]] = [{} for _ in self.training.params]
        parts = [self._part(i) for i in range(len(self.training.params))]
        if alike(*(part.state for part in parts)):
            return self._replay_parts(parts, scaled)
        self.apart = True
        return torch.cat([self._replay_parts([part], scaled) for part in parts])

    def _replay_whole(self, i: int, scaled: ScaledWeights) -> Tensor:
        param, state, at = self.training.params[i], dict(self.training.states()[i]), self.training.drawn[i]
        assert param.grad is not None
        whole = scaled.whole(param.detach(), state)
        state.pop(scaled.scheme.carrier, None)
        changes = [
            self.twin.replay_whole(0, whole, param.grad, state, widen=False, scaled=scaled, may_draw=True).param - whole
            for _ in range(2)
        ]
        self.is_random |= not torch.equal(*changes)
        return sampled(changes[0], at)

    def _part(self, i: int) -> Run:
        param, at, state = self.training.params[i], self.training.drawn[i], self.training.states()[i]
        assert param.grad is not None
        drawn: dict[str, Any] = {}
        for name, value in state.items():
            if name == self.scaled.scheme.carrier:
                continue
            form = self.training.form(name)
            if form == "other":
                raise ReplayError(f"{self.training.name} keeps state '{name}', which cannot be sampled")
            if form == "element" and value is not None:
                drawn[name] = sampled(value, at).float()
            else:
                drawn[name] = value.clone() if isinstance(value, Tensor) else value
        return Run(0, self._whole(i), sampled(param.grad, at).float(), drawn)

    def _replay_parts(self, parts: list[Run], scaled: ScaledWeights) -> Tensor:
        """Every part twice: what throws dice treats the two differently."""

        def joined(tensors: list[Tensor]) -> Tensor:
            stacked = torch.stack(tensors * 2)
            return stacked if self.way is Way.rows else stacked.reshape(-1)

        state = {
            name: joined([part.state[name] for part in parts]) if is_element(value, parts[0].param) else value
            for name, value in parts[0].state.items()
        }
        param, grads = joined([p.param for p in parts]), [p.grad for p in parts if p.grad is not None]
        run = Run(0, param, joined(grads), state, scaled, may_draw=True)
        result = self.twin.replay([run])[0]
        change = (result.param - param).reshape(2, len(parts), -1)
        for i, kept in enumerate(self._replayed if len(parts) > 1 else ()):
            kept.update(
                (name, value.reshape(2, len(parts), -1)[0, i])
                for name, value in result.state.items()
                if name in self._names and is_element(value, result.param)
            )
        self.is_random |= not torch.equal(change[0], change[1])
        return change[0]
