"""Wrong arguments, states and files: a clear error that names owner, value and remedy, or a degradation that is stated."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import update_watch as uw
from tests.support.watch_nets import Net, train
from update_watch.callbacks.options import Options
from update_watch.dashboards.journal import Journal, JournalError, read_journal
from update_watch.report import Cause, Health

# --- arguments -------------------------------------------------------------------------------------------

NO_OPTIMIZER = r"has no torch optimizer .* give a torch\.optim\.Optimizer"
WATCH: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": 0}, ValueError, r"watch\(window=0\): .* must be a whole number of 1 or more"),
    ({"window": -8}, ValueError, r"watch\(window=-8\): .* must be a whole number of 1 or more"),
    ({"window": True}, ValueError, r"watch\(window=True\)"),
    ({"window": 2.0}, ValueError, r"watch\(window=2\.0\)"),
    ({"window": None}, ValueError, r"watch\(window=None\)"),
    ({"samples": -1}, ValueError, r"watch\(samples=-1\): .* must be a whole number of 4 or more"),
    ({"samples": 3}, ValueError, r"watch\(samples=3\)"),
    ({"samples": True}, ValueError, r"watch\(samples=True\)"),
    ({"samples": 256.0}, ValueError, r"watch\(samples=256\.0\)"),
    ({"samples": "256"}, ValueError, r"watch\(samples='256'\)"),
    ({"optimizer": "adamw"}, TypeError, rf"watch\(optimizer='adamw'\): str {NO_OPTIMIZER}"),
    ({"optimizer": torch.optim.AdamW}, TypeError, rf"watch\(optimizer=.*AdamW.*{NO_OPTIMIZER}"),
    ({"optimizer": Net().parameters()}, TypeError, rf"watch\(optimizer=generator\): generator {NO_OPTIMIZER}"),
    ({"optimizer": []}, ValueError, r"watch\(optimizer=\[\]\): give at least one torch optimizer"),
    ({"optimizer": [None]}, TypeError, rf"watch\(optimizer=None\): NoneType {NO_OPTIMIZER}"),
    ({"model": None}, TypeError, r"watch\(model=None\): expected a torch module or \(name, tensor\) pairs"),
    ({"model": Net}, TypeError, r"watch\(model=.*Net.*\): expected a torch module"),
    ({"model": Net().state_dict()}, TypeError, r"watch\(model=OrderedDict\): .*as model\.named_parameters\(\) gives"),
    ({"model": Net().parameters()}, TypeError, r"watch\(model=generator\): expected a torch module"),
    ({"sinks": None}, TypeError, r"watch\(sinks=None\): expected a list of sinks"),
    ({"sinks": print}, TypeError, r"watch\(sinks=<built-in function print>\): expected a list of sinks"),
    (
        {"sinks": "run.jsonl"},
        TypeError,
        r"watch\(sinks='run\.jsonl'\): expected a list of sinks, as in sinks=\[Journal",
    ),
    ({"sinks": ["run.jsonl"]}, TypeError, r"watch\(sinks=\['run\.jsonl'\]\): a sink is a callable that takes a Report"),
    (
        {"thresholds": {"stalled": 0.1}},
        TypeError,
        r"thresholds=\{'stalled': 0\.1\}\): expected update_watch\.Thresholds",
    ),
    ({"thresholds": uw.Thresholds}, TypeError, r"thresholds=<class .*expected update_watch\.Thresholds or None"),
    ({"averages": [Net()]}, TypeError, r"watch\(averages=list\): expected names and averaged models"),
    ({"seed": "a"}, TypeError, r"watch\(seed='a'\): expected a whole number"),
    ({"seed": 1.5}, TypeError, r"watch\(seed=1\.5\)"),
    ({"step": 7}, TypeError, r"watch\(step=7\): expected a function that returns the trainer's step, or None"),
    ({"join": "no"}, TypeError, r"watch\(join='no'\): expected True, False or a process group"),
    ({"check_replicas": 1}, TypeError, r"watch\(check_replicas=1\): expected True or False"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), WATCH, ids=lambda x: str(x)[:40])
def test_a_wrong_argument_of_watch_is_named_with_its_remedy_and_nothing_is_attached(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(error, match=message):
        uw.watch(**{"model": model, "optimizer": optimizer, **arguments})
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"window": 0}, ValueError, r"UpdateWatch\(window=0\) must be a whole number of at least 1"),
    ({"window": 8.0}, ValueError, r"UpdateWatch\(window=8\.0\)"),
    ({"samples": -1}, ValueError, r"UpdateWatch\(samples=-1\) must be a whole number of at least 4"),
    ({"sinks": None}, TypeError, r"UpdateWatch\(sinks=None\) must be a list of sinks"),
    ({"sinks": "run.jsonl"}, TypeError, r"UpdateWatch\(sinks='run\.jsonl'\) must be a list of sinks"),
    ({"sinks": [1]}, TypeError, r"UpdateWatch\(sinks=\[1\]\): a sink is a callable"),
    ({"thresholds": {}}, TypeError, r"UpdateWatch\(thresholds=\{\}\) must be update_watch\.Thresholds or None"),
    ({"averages": [1]}, TypeError, r"UpdateWatch\(averages=\[1\]\) must map names to models"),
    ({"seed": "x"}, TypeError, r"UpdateWatch\(seed='x'\) must be a whole number"),
    ({"on_stall": "kill"}, ValueError, r"UpdateWatch\(on_stall='kill'\) must be 'warn', 'stop', 'raise' or a function"),
    ({"on_stall": None}, ValueError, r"UpdateWatch\(on_stall=None\)"),
    ({"progress_bar": "yes"}, TypeError, r"UpdateWatch\(progress_bar='yes'\) must be True or False"),
    ({"print_audit": 1}, TypeError, r"UpdateWatch\(print_audit=1\) must be True or False"),
    ({"print_audit": "short"}, TypeError, r"UpdateWatch\(print_audit='short'\) must be True or False"),
]
GOOD_OPTIONS: dict[str, Any] = {
    "window": 8,
    "samples": 16,
    "sinks": [print],
    "thresholds": None,
    "averages": None,
    "seed": 0,
    "on_stall": "warn",
    "progress_bar": True,
    "print_audit": True,
    "check_replicas": False,
}


@pytest.mark.parametrize(("options", "error", "message"), OPTIONS, ids=lambda x: str(x)[:40])
def test_a_wrong_option_of_a_callback_is_named_before_training_begins(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert Options(**GOOD_OPTIONS).sinks == (print,)
    with pytest.raises(error, match=message):
        Options(**{**GOOD_OPTIONS, **options})


SINKS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: Journal(None), TypeError, r"Journal\(path=None\) must name the file to write"),  # type: ignore[arg-type]
    (lambda: Journal(""), TypeError, r"Journal\(path=''\) must name the file to write, such as 'run\.jsonl'"),
    (lambda: Journal("j", max_bytes=1.5), ValueError, r"max_bytes=1\.5\) must be a positive number of bytes, or None"),  # type: ignore[arg-type]
    (lambda: Journal("j", max_bytes="1"), ValueError, r"Journal\(max_bytes='1'\) must be"),  # type: ignore[arg-type]
    (lambda: Journal("j", run="gpt"), ValueError, r"Journal\(run=\.\.\.\) .* such as \{'name': 'gpt'\}, not 'gpt'"),  # type: ignore[arg-type]
    (lambda: Journal("j", run={"loss": float("nan")}), ValueError, r"Journal\(run=\.\.\.\) must be plain JSON data"),
]


@pytest.mark.parametrize(("make", "error", "message"), SINKS)
def test_a_wrong_argument_of_a_sink_is_named(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"max_tensors": "a"}, ValueError, r"WandbSink\(max_tensors='a'\) must be a whole number of at least 0"),
        ({"max_tensors": True}, ValueError, r"WandbSink\(max_tensors=True\)"),
        ({"step_key": 3}, ValueError, r"WandbSink\(step_key=3\) must name the trainer's step"),
        (
            {"run": "my-project"},
            TypeError,
            r"WandbSink\(run='my-project'\) must be a W&B run, as wandb\.init\(\) gives",
        ),
    ],
)
def test_a_wrong_argument_of_the_wandb_sink_is_named(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    pytest.importorskip("wandb")
    from update_watch.dashboards import WandbSink

    with pytest.raises(error, match=message):
        WandbSink(**arguments)


def test_thresholds_out_of_order_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"Thresholds\(stalled=0\.9, stalled_exit=0\.15\): .*; set both"):
        uw.Thresholds(stalled=0.9)
    with pytest.raises(ValueError, match=r"Thresholds\(state_low=1\.2, state_high=1\.5\): 1 is the healthy"):
        uw.Thresholds(state_low=1.2)


# --- models and optimizers that do not fit ---------------------------------------------------------------


def test_an_optimizer_without_the_models_parameters_is_reported_as_such() -> None:
    model, other = Net(), Net(seed=1)
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=1000) as watch:
        train(other, optimizer, 12)
        report = watch.flush()
    assert report is not None
    found = {t.name: t for t in report.tensors}
    for name in ("enter.weight", "enter.bias", "leave.weight"):
        assert found[name].health is Health.unknown
        assert "its optimizer steps other tensors than the model's" in found[name].advice
    assert found["group0.param0"].health is Health.healthy  # what the optimizer does hold, by its place


def test_a_model_on_the_meta_device_is_unknown_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).to("meta")
    optimizer = torch.optim.AdamW(model.parameters())
    with uw.watch(model, optimizer, window=1000) as watch:
        for _ in range(8):
            optimizer.zero_grad()
            model(torch.empty(2, 4, device="meta")).sum().backward()
            optimizer.step()
        report = watch.flush()
    assert report is not None and report.window == 8
    assert {(t.health, t.cause) for t in report.tensors} == {(Health.unknown, Cause.not_replayable)}
    assert "meta" in report.tensors[0].advice


def test_a_model_without_parameters_of_its_own_does_for_a_model() -> None:
    other = Net()
    optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    with uw.watch(nn.ReLU(), optimizer, window=1000) as watch:
        train(other, optimizer, 8)
        report = watch.flush()
    assert report is not None and len(report.tensors) == 4


def test_a_closed_watch_says_so_when_it_is_attached() -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    watch = uw.watch(model, optimizer)
    watch.close()
    with pytest.raises(RuntimeError, match=r"Watch\.attach: this watch is closed; make another"):
        watch.attach(optimizer)
    assert not optimizer._optimizer_step_pre_hooks


# --- states ----------------------------------------------------------------------------------------------


def _trained() -> dict[str, Any]:
    model = Net(torch.bfloat16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with uw.watch(model, optimizer, window=8) as watch:
        train(model, optimizer, 24)
        watch.flush()
        return watch.state_dict()


STATE = _trained()
STATES: list[tuple[Any, type[Exception], str]] = [
    (
        None,
        ValueError,
        r"Watch\.load_state_dict: version 'NoneType' cannot be read, 1 is expected; leave the state out",
    ),
    ([1], ValueError, r"version 'list' cannot be read"),
    ({}, ValueError, r"version None cannot be read"),
    ({**STATE, "version": 2}, ValueError, r"version 2 cannot be read, 1 is expected"),
    ({k: v for k, v in STATE.items() if k != "diagnosis"}, TypeError, r"diagnosis=None is not a Mapping: pass what"),
    ({k: v for k, v in STATE.items() if k != "alerts"}, TypeError, r"alerts=None is not a Mapping: pass what"),
    ({**STATE, "step": "x"}, TypeError, r"Watch\.load_state_dict: step='x' is not a int"),
    ({**STATE, "step": -1}, ValueError, r"Watch\.load_state_dict: step=-1 is not a step"),
    ({**STATE, "step": True}, ValueError, r"step=True is not a step"),
    ({**STATE, "step": float("nan")}, TypeError, r"step=nan is not a int"),
    ({**STATE, "diagnosis": {}}, ValueError, r"Diagnosis\.load_state_dict: version=None, 2 expected"),
    ({**STATE, "diagnosis": {**STATE["diagnosis"], "last_step": "x"}}, ValueError, r"last_step='x' is not a step"),
    ({**STATE, "alerts": {"version": 9}}, ValueError, r"Alerts\.load_state_dict: version=9, 2 expected: pass what"),
]


@pytest.fixture(scope="module")
def fresh() -> uw.Watch:
    model = Net(torch.bfloat16)
    return uw.watch(model, torch.optim.AdamW(model.parameters()))


@pytest.mark.parametrize(("state", "error", "message"), STATES, ids=lambda x: str(x)[:40])
def test_a_corrupt_state_is_named_with_its_remedy_and_changes_nothing(
    fresh: uw.Watch, state: Any, error: type[Exception], message: str
) -> None:
    before = fresh.state_dict()
    with pytest.raises(error, match=message):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before


PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.binary(max_size=3)
GARBAGE = st.recursive(PLAIN, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), x, max_size=3))  # fmt: skip
CHANGES = st.lists(st.tuples(st.lists(st.integers(0, 40), min_size=1, max_size=7), GARBAGE), min_size=1, max_size=4)


def damaged(data: Any, changes: list[tuple[list[int], Any]]) -> Any:
    """`data`, plain JSON, with some of its values replaced; a route leads down to each."""
    data = json.loads(json.dumps(data))
    for route, value in changes:
        node, key = {"": data}, ""
        for turn in route:
            child: Any = node[key]
            keys = (
                list(child) if isinstance(child, dict) else list(range(len(child))) if isinstance(child, list) else []
            )
            if not keys:
                break
            node, key = child, keys[turn % len(keys)]
        if key != "":
            node[key] = value
    return data


@settings(max_examples=60, deadline=None)
@given(changes=CHANGES)
def test_no_state_raises_anything_but_type_and_value_errors_and_what_is_taken_over_can_be_judged_with(
    fresh: uw.Watch, changes: list[tuple[list[int], Any]]
) -> None:
    before = fresh.state_dict()
    try:
        fresh.load_state_dict(damaged(STATE, changes))
    except (TypeError, ValueError):
        assert fresh.state_dict() == before
        return
    json.dumps(fresh.state_dict())
    last = fresh.last
    fresh._close_window()
    fresh._settle(10.0)
    assert fresh.last is not last  # judged with that memory, and told against it


@settings(max_examples=60, deadline=None)
@given(state=GARBAGE)
def test_no_rubbish_as_a_state_raises_anything_but_type_and_value_errors(fresh: uw.Watch, state: Any) -> None:
    with pytest.raises((TypeError, ValueError)):
        fresh.load_state_dict(state)


# --- journals --------------------------------------------------------------------------------------------


def test_a_journal_with_corrupt_lines_is_read_without_them_and_they_are_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with uw.watch(model, optimizer, window=2, sinks=[Journal(path)]):
        train(model, optimizer, 8)
    lines = path.read_bytes().splitlines(keepends=True)
    assert len(lines) == 6  # header, tensors, four windows
    lines[3] = lines[3][:40] + b"\x00\xff" + lines[3][42:]
    lines[4] = b'{"kind":"window","step":true}\n'
    path.write_bytes(b"".join(lines) + lines[5][:50])
    with pytest.warns(UserWarning, match=r"j\.jsonl: 2 damaged lines were skipped \(line 4, 5; the first: .*\)"):
        assert [r.step for r in read_journal(path)] == [2, 8]


def test_a_journal_of_a_newer_schema_is_named_with_the_remedy_and_not_written_to(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    line = '{"kind":"header","format":"update-watch journal","schema":99,"time":1.0,"run":{}}\n'
    path.write_text(line)
    with pytest.raises(JournalError, match=r"j\.jsonl .* schema is version 99, .* pip install -U update-watch"):
        list(read_journal(path))
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.warns(UserWarning, match="sink Journal failed and is dropped: JournalError.*schema is version 99"):
        with uw.watch(model, optimizer, window=2, sinks=[Journal(path)]):
            train(model, optimizer, 4)
    assert path.read_text() == line


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(GARBAGE.map(lambda x: x if isinstance(x, dict) else {"kind": x}), max_size=3), changes=CHANGES)
def test_no_journal_line_raises_anything_but_a_journal_error(
    tmp_path: Path, lines: list[Any], changes: list[tuple[list[int], Any]]
) -> None:
    path = tmp_path / "base.jsonl"
    if not path.exists():
        model = Net(torch.bfloat16)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with uw.watch(model, optimizer, window=8, sinks=[Journal(path)]):
            train(model, optimizer, 16)
    good = [json.loads(line) for line in path.read_text().splitlines()]
    bad = tmp_path / "bad.jsonl"
    found = [*damaged(good, changes), *lines]
    bad.write_bytes(b"".join(json.dumps(line, default=repr, skipkeys=True).encode() + b"\n" for line in found))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            for report in read_journal(bad):
                json.dumps(report.to_dict(), allow_nan=False)
        except JournalError:
            pass
