"""A model's names are read anew only where something in it has changed, and then they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from update_watch.measure.identity import names
from update_watch.measure.identity.names import NamedModel, named_tensors


def model() -> nn.Sequential:
    made = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 2))
    made[2].extra = nn.Parameter(torch.zeros(2))
    return made


def new_head(made: nn.Sequential) -> None:
    made[2] = nn.Linear(3, 2)


def new_weight(made: nn.Sequential) -> None:
    made[1][0].weight = nn.Parameter(torch.zeros(3, 3))


def renamed(made: nn.Sequential) -> None:
    extra = made[2]._parameters.pop("extra")
    made[2]._parameters["other"] = extra


def more(made: nn.Sequential) -> None:
    made[1].append(nn.Linear(3, 3))


def less(made: nn.Sequential) -> None:
    made[1][1].weight = None


def tied(made: nn.Sequential) -> None:
    made[1][0].bias = made[0].bias


def dict_replaced(made: nn.Sequential) -> None:
    made[0].__dict__["_parameters"] = {name: nn.Parameter(p.detach().clone()) for name, p in made[0].named_parameters()}


@pytest.mark.parametrize("change", [new_head, new_weight, renamed, more, less, tied, dict_replaced])
def test_what_changes_is_seen(change: Callable[[nn.Sequential], None], monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[int] = []
    read = names.named_tensors
    monkeypatch.setattr(names, "named_tensors", lambda given: (reads.append(1), read(given))[1])
    made = model()
    named = NamedModel(made)
    for _ in range(3):
        assert named.refresh() == {}
    assert len(reads) == 2  # when it was made, and the first time
    before = dict(named.pairs)
    change(made)
    left = named.refresh()
    now = dict(named_tensors(made))
    staying = {id(tensor) for tensor in now.values()}
    assert left.keys() == {name for name, old in before.items() if id(old) not in staying and name in left}
    assert {name: id(tensor) for name, tensor in named.pairs if name in now} == {n: id(t) for n, t in now.items()}
    assert len(reads) == 3
    assert named.refresh() == {}


def test_a_model_that_names_its_tensors_itself_is_asked_each_time() -> None:
    class Own(nn.Linear):
        def named_parameters(self, *given: object, **options: object):  # type: ignore[no-untyped-def, override]
            yield "mine", hidden[0]

    hidden = [nn.Parameter(torch.zeros(1))]
    named = NamedModel(Own(2, 2))
    assert named.refresh() == {}
    hidden[0] = nn.Parameter(torch.ones(1))
    assert list(named.refresh()) == ["mine"] and named.pairs == [("mine", hidden[0])]
