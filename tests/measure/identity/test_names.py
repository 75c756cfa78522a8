"""A model's names are read anew only where something in it has changed, and then they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import update_watch as uw
from tests.support.watch_nets import Net, backward, batches
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


@pytest.mark.parametrize("kind", [list, tuple])
def test_pairs_that_are_the_same_are_not_read_again(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[None] = []
    read = names.named_tensors
    monkeypatch.setattr(names, "named_tensors", lambda given: (reads.append(None), read(given))[1])
    named = NamedModel(kind((str(i), nn.Parameter(torch.zeros(2))) for i in range(3)))
    for _ in range(3):
        assert named.refresh() == {}
    assert len(reads) == 1


def test_pairs_that_come_back_are_read_again() -> None:
    pairs = [(str(i), nn.Parameter(torch.zeros(2))) for i in range(3)]
    named, first, other = NamedModel(pairs), pairs[0], ("0", nn.Parameter(torch.ones(2)))
    pairs[0] = other
    assert named.refresh() == {"0": first[1]} and named.pairs == [other, *pairs[1:]]
    assert named.refresh() == {}
    pairs[0] = first
    assert named.refresh() == {"0": other[1]} and named.pairs == [first, *pairs[1:]]
    pairs.append(("3", other[1]))
    assert named.refresh() == {} and len(named.pairs) == 4


def test_a_model_that_names_its_tensors_itself_is_asked_each_time() -> None:
    class Own(nn.Linear):
        def named_parameters(self, *given: object, **options: object):  # type: ignore[no-untyped-def, override]
            yield "mine", hidden[0]

    hidden = [nn.Parameter(torch.zeros(1))]
    named = NamedModel(Own(2, 2))
    assert named.refresh() == {}
    hidden[0] = nn.Parameter(torch.ones(1))
    assert list(named.refresh()) == ["mine"] and named.pairs == [("mine", hidden[0])]


def taken_apart(net: Net) -> None:
    """The head gets a new tensor, while another name keeps the old one."""
    net.kept = net.leave.weight
    net.leave.weight = nn.Parameter(torch.zeros(48, 64))


def grown(net: Net) -> None:
    net.more = nn.Linear(48, 48)


@pytest.mark.parametrize(
    ("change", "said"), [(taken_apart, "it was replaced after step"), (grown, "it came into the model after step")]
)
@pytest.mark.parametrize("is_held", [True, False])
def test_what_comes_into_the_model_and_into_no_optimizer_is_told(
    change: Callable[[Net], None], said: str, is_held: bool
) -> None:
    net, titles = Net(), list[str]()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    with uw.watch(net, optimizer, window=16, sinks=[lambda r: titles.extend(a.title for a in r.alerts)]) as watch:
        for i, x in enumerate(batches(64)):
            if i == 40 and change is taken_apart and not is_held:  # and once more
                net.leave.weight = nn.Parameter(torch.zeros(48, 64))
            if i == 24:
                known = set(net.parameters())
                change(net)
                if is_held:
                    optimizer.add_param_group({"params": [p for p in net.parameters() if p not in known]})
            net.zero_grad()
            backward(net, x)
            if hasattr(net, "more"):
                net.more(x).square().sum().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None
    left = [t for t in report.tensors if t.cause is uw.Cause.not_in_optimizer]
    assert bool(left) is not is_held and len(titles) == (not is_held)
    assert all(said in t.advice and t.health is uw.Health.idle for t in left)
