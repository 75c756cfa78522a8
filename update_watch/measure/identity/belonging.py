"""Which optimizer steps which of the model's tensors, itself or a master of it, and what is said of those none steps."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, NamedTuple

from torch import Tensor
from torch.optim import Optimizer

from update_watch.evidence import TensorEvidence
from update_watch.measure.identity import masters, owners
from update_watch.measure.identity.names import NamedModel, describe, members_of
from update_watch.measure.identity.partitions import Piece, wrappers

_LEAST_STEPS = 6  # of an optimizer whose tensors got no gradient, before that means something
_ASKED = 3  # steps of an optimizer in which the gradients of copies may still tell whose they are


class _Supposed(NamedTuple):
    """What an optimizer steps that looks like masters."""

    pairs: list[tuple[Tensor, Tensor]]  # copy, and what it is a copy of
    maybe: list[Tensor]  # others of the model's that they may hold
    is_foreign: bool  # nothing it steps is the model's own


class Belonging:
    """What is known of the model's tensors and of those that stand for them."""

    def __init__(self, model: Any) -> None:
        """Raises TypeError for what is neither a module nor (name, tensor) pairs."""
        self.named = NamedModel(model)
        self.names = self.named.names  # id(tensor) -> its names, masters included
        self.pieces: dict[int, Sequence[Piece]] = {}  # id of a flat tensor that is stepped -> what lies in it
        self.masters: dict[int, Tensor] = {}  # id of a parameter -> the tensor of its shape that is stepped instead
        self.flats: dict[
            int, int
        ] = {}  # id of a master -> id of the flat tensor that is stepped, of which it is a part
        self._instead: dict[int, str] = {}  # id of a parameter that no optimizer holds -> what is said of it
        self._notes: dict[int, str] = {}  # id of a parameter that no optimizer holds -> how that came about
        self._supposed: dict[int, _Supposed] = {}  # by id of an optimizer
        self._unsure: dict[int, int] = {}  # id of an optimizer -> how often it could not be told whether it is ours

    # --- optimizers ------------------------------------------------------------------------------

    def is_ours(self, optimizer: Optimizer, stepped: frozenset[int], step: int) -> bool | None:
        """Whether an optimizer steps this model's tensors or masters of them; None: that cannot be told yet.

        `stepped`: ids of what other optimizers step.
        """
        members = members_of(optimizer)
        if not members:
            return None
        if all(id(param) not in self.names for param in members):
            self.refresh(step, stepped)
        if any(id(param) in self.names for param in members):
            return True
        found = masters.find(self._unstepped(stepped), self.names, optimizer)
        if found.is_empty:
            return False
        if len(found.names) > len(found.pairs) or found.pieces:
            return True  # the model's parameters say so
        is_fed = masters.share_gradients(found.pairs)
        if is_fed is None and not owners.modules_with(master for master, _ in found.pairs):
            return True  # copies of the model's tensors that are no other model's
        self._unsure[id(optimizer)] = asked = self._unsure.get(id(optimizer), 0) + 1
        return is_fed if is_fed is not None or asked < _ASKED else False

    def claim(self, optimizer: Optimizer, wrapper: Any, stepped: frozenset[int], step: int) -> None:
        """Name what an optimizer steps; `wrapper`: what it came in."""
        members = members_of(optimizer)
        if members and all(id(param) in self.names for param in members):
            return
        self.refresh(step, stepped)  # parameters made since
        known = {id(tensor) for tensor in self.named.tensors()}
        found = masters.find(self._unstepped(stepped), self.names, optimizer, wrappers(wrapper), self.masters)
        self.names.update(found.names)
        self.pieces.update(found.pieces)
        for param_id, reason in found.instead.items():
            if reason == "" or self._instead.get(param_id) != "":
                self._instead[param_id] = reason
        self.masters.update({id(param): master for master, param in found.pairs})
        self.masters.update({id(param): view for view, param, _ in found.views})
        self.flats.update({id(view): id(flat) for view, _, flat in found.views})
        if found.pieces:
            return
        if known.isdisjoint(map(id, members)):
            maybe = [tensor for tensor in self.named.tensors() if id(tensor) in found.instead]
            self._supposed[id(optimizer)] = _Supposed(found.pairs, maybe, is_foreign=True)
        elif found.pairs:
            self._supposed[id(optimizer)] = _Supposed(found.pairs, [], is_foreign=False)

    def disown(self, optimizer_id: int) -> None:
        """An optimizer is watched no more: its masters' parameters are free."""
        self._supposed.pop(optimizer_id, None)
        self._unsure.pop(optimizer_id, None)

    def forget_masters(self, ids: frozenset[int]) -> None:
        """These tensors are stepped no more."""
        for param_id, master in list(self.masters.items()):
            if not ids.isdisjoint(self.stepped_as(master)):
                del self.masters[param_id]
                self.names.pop(id(master), None)
                self.flats.pop(id(master), None)
                self._instead.pop(param_id, None)

    def supposed(self) -> list[int]:
        """Ids of the optimizers that step copies of the model's tensors, or what may be such."""
        return list(self._supposed)

    def doubt(self, optimizer_id: int, steps: int, ids: Set[int], fed: Set[int], zeros: Set[int]) -> Set[int]:
        """Copies that had no gradient in a whole window, or zeros, are no masters. Ids of those among the tensors of this optimizer.

        `ids`: of its tensors; `fed`: of those that had one; `zeros`: of those of which all that was measured of it is 0. What is
        there now may have been set to 0 since the last step. Where it steps nothing else of the model, one that is fed speaks
        for all: the others may be of parameters that are not used.
        """
        if steps < _LEAST_STEPS:
            return frozenset()
        pairs, maybe, is_foreign = self._supposed.pop(optimizer_id)
        if is_foreign:
            if fed and not ({id(master) for master, _ in pairs} <= zeros and masters.get_zeros(pairs)):
                return frozenset()
            get = (
                "get no gradient"
                if not fed
                else "get gradients of 0 alone, though the model's are not (scaled or clipped to 0?)"
            )
            note = f"its optimizer steps {len(ids)} tensors that are not the model's and that {get}, as when it was"
        else:
            pairs = [
                (master, param)
                for master, param in pairs
                if param.grad is not None
                and (id(master) not in fed or (id(master) in zeros and masters.get_zeros([(master, param)])))
            ]
            note = "its optimizer steps another tensor of the same values, which gets no gradient, as when it was"
        for master, _ in pairs:
            self.names.pop(id(master), None)
        for param in {id(param): param for param in (*maybe, *(param for _, param in pairs))}.values():
            self._instead.pop(id(param), None)
            self.masters.pop(id(param), None)
            self._notes[id(param)] = f"{note} made before the model was wrapped or moved"
        return ids if is_foreign else {id(master) for master, _ in pairs}

    def covered_by(self, ids: frozenset[int]) -> frozenset[int]:
        """What an optimizer that steps these tensors answers for: them, and the parameters they are masters of."""
        return ids.union(key for key, master in self.masters.items() if not ids.isdisjoint(self.stepped_as(master)))

    def stepped_as(self, master: Tensor) -> set[int]:
        """Ids of a master, and of the flat tensor that it is a part of."""
        return {id(master)} | ({self.flats[id(master)]} if id(master) in self.flats else set())

    # --- tensors ---------------------------------------------------------------------------------

    def refresh(self, step: int, stepped: frozenset[int]) -> frozenset[int]:
        """See what has taken the place of what in the model since a step. Returns the ids of what has left it."""
        pairs = self.named.pairs
        left = self.named.refresh()
        if self.named.pairs is not pairs and step:
            before, known = dict(pairs), {id(tensor) for _, tensor in pairs}
            for name, new in self.named.pairs:
                if id(new) in known or id(new) in stepped:
                    continue
                if name in before and (id(before[name]) in stepped or id(before[name]) in self._notes):
                    note = f"it was replaced after step {step:,}, and the optimizer still steps the old one"
                else:
                    note = f"it came into the model after step {step:,}"
                self._notes[id(new)] = note
        return frozenset(id(old) for old in left.values())

    def _unstepped(self, stepped: frozenset[int]) -> list[tuple[str, Tensor]]:
        """The model's tensors that no optimizer steps itself."""
        return [(name, tensor) for name, tensor in self.named.pairs if id(tensor) not in stepped]

    def unheld(self, held: Set[int], steps: int) -> list[TensorEvidence]:
        """The model's tensors that no optimizer holds, and whose masters are not known: with why, and how it came about."""
        found: list[TensorEvidence] = []
        if self.named.ids() <= held:
            return found
        for tensor in self.named.tensors():
            reason = self._instead.get(id(tensor))
            if id(tensor) not in held and reason != "":
                facts = describe(tensor, self.names[id(tensor)])
                group, note = "0/0" if reason else "", self._notes.get(id(tensor), "")
                evidence = TensorEvidence(**facts, steps=steps, reason=reason or "", optimizer_group=group, note=note)
                found.append(evidence)
        return found

    def unstepped(self, reason: str) -> tuple[TensorEvidence, ...]:
        """All of the model's tensors, of which the same is said."""
        found = []
        for tensor in self.named.tensors():
            facts = describe(tensor, self.names[id(tensor)])
            found.append(TensorEvidence(**facts, reason=reason, optimizer_group="0/0"))
        return tuple(found)
