"""Which tensors the ledger reads, and with whose steps."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor

from update_watch.measure.identity.belonging import Belonging
from update_watch.measure.ledger.ledger import Ledger
from update_watch.measure.ledger.sheet import Line
from update_watch.measure.watched_optimizer import Watched
from update_watch.replay.kept_states import states_of
from update_watch.replay.rounding_scheme import Join


def lines_of(belonging: Belonging) -> list[Line]:
    """The model's tensors and their masters."""
    names, masters = belonging.names, belonging.masters
    return [Line(tensor, names[id(tensor)], masters.get(id(tensor))) for tensor in belonging.named.tensors()]


def plan(ledger: Ledger, belonging: Belonging, watched: Mapping[Any, Watched], is_old: bool) -> None:
    """Every tensor of the model, with who steps it or its master. `is_old`: that must be found out anew."""
    ledger.open({key: one.open_panel for key, one in watched.items()})
    # of thousands: sets that are made anew each time would take most of a window's end
    unmeasured = [id(row.param) for one in watched.values() for row in one.rows if row.reason]
    held = {key: (one.ids, one.row_ids) for key, one in watched.items()}
    inside = ledger.standing(_masters_inside(watched))
    masters = {key: id(master) for key, master in (inside | belonging.masters).items()}
    if ledger.is_planned_for(belonging.named.pairs, (unmeasured, held, masters)) and not is_old:
        return
    measured = {id(row.param) for one in watched.values() for row in one.rows if not row.reason}
    owners: dict[int, set[Hashable]] = {}
    for key, one in watched.items():
        for tensor_id in one.ids:
            owners.setdefault(tensor_id, set()).add(key)
    planned = []
    for line in lines_of(belonging):
        within = inside.get(id(line.tensor)) if line.master is None else None
        ids = {id(line.tensor)} if line.master is None else {id(line.tensor)} | belonging.stepped_as(line.master)
        who = frozenset(owner for tensor_id in ids for owner in owners.get(tensor_id, ()))
        panels = {(key, watched[key].panel_of(tensor_id)) for key in who for tensor_id in ids & watched[key].ids}
        panel = panels.pop() if len(panels) == 1 else None
        line = line if within is None else line._replace(master=within)
        planned.append((line, who, bool(who) and measured.isdisjoint(ids), panel))
    ledger.plan(planned)


def _masters_inside(watched: Mapping[Any, Watched]) -> dict[int, Tensor]:
    """By the id of a weight the state that holds all of it, where its rule rounds the weight from that: it may be written to
    between steps as well.
    """
    found = {}
    for one in watched.values():
        rows = [row for row in one.rows if row.scheme.join is Join.master and not row.scheme.is_part and not row.reason]
        states = states_of(one.optimizer) if rows else {}
        for row in rows:
            master = states.get(row.param, {}).get(row.scheme.carrier)
            if isinstance(master, Tensor) and row.param.requires_grad and row.piece is None:
                found[id(row.param)] = master
    return found
