"""Checkpoints made to break the reader: a reason in one line, no traceback, no escape, no time without bound."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from update_watch.checkpoints.at_rate import at_rate, of_files
from update_watch.checkpoints.comparison import compare, compare_all
from update_watch.checkpoints.diff import diff, diff_tensors
from update_watch.checkpoints.files import CheckpointError, read_tensors
from update_watch.cli import main

DTYPES = sorted(
    {
        value
        for value in vars(torch).values()
        if isinstance(value, torch.dtype) and not str(value).startswith("torch.q")
    },
    key=str,
)


def _safetensors(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


@pytest.mark.parametrize(
    "header",
    [
        b'{"w": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [0, 99999999999, 99999999999], "data_offsets": [0, 0]}}',
        b'{"w": {"dtype": "F32", "shape": [' + b"9" * 6000 + b'], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": ["F32"], "shape": [2], "data_offsets": [0, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4, 8]}}',
        b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.5, 8.5]}}',
        b'{"w": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"__metadata__": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b'{"w": 3}',
        b'{"__metadata__": 3}',
        b"\xff\xfe{}",
    ],
    ids=lambda header: header[:24].decode("ascii", "replace"),
)
def test_a_hostile_header_is_refused_in_one_line(tmp_path: Path, header: bytes) -> None:
    path = _safetensors(tmp_path / "a.safetensors", header, bytes(8))
    with pytest.raises(CheckpointError, match=r"a\.safetensors: ") as caught:
        read_tensors(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


def _holding(value: Any) -> Any:
    value.append(value)
    return value


def _doubling(depth: int) -> list[Any]:
    """2^depth tensors in a file of some kilobytes."""
    value: list[Any] = [torch.ones(1)]
    for _ in range(depth):
        value = [value, value]
    return value


def _deep(depth: int) -> list[Any]:
    value: list[Any] = [torch.ones(1)]
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.slow
@pytest.mark.parametrize(
    "content",
    [_holding([torch.ones(1)]), {"state_dict": _holding([])}, _doubling(60), _doubling(90), _deep(400)],
    ids=["in-itself", "weights-in-themselves", "doubling", "doubling-on", "deep"],
)
def test_containers_without_an_end_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    started = time.monotonic()
    with pytest.raises(CheckpointError, match=r"nested more than 100 deep, or hold more than"):
        read_tensors(tmp_path / "a.pt")
    assert time.monotonic() - started < 60


def test_containers_of_every_kind_are_read_by_their_path(tmp_path: Path) -> None:
    weights = {
        "a": [torch.ones(1), (torch.zeros(2), {"b": torch.ones(3)})],
        7: torch.ones(4),
        ("x", "y"): torch.ones(5),
    }
    torch.save(weights, tmp_path / "a.pt")
    found = {name: len(tensor) for name, tensor in read_tensors(tmp_path / "a.pt").items()}
    assert found == {"a.0": 1, "a.1.0": 2, "a.1.1.b": 3, "7": 4, "tuple": 5}
    assert list(found) == ["a.0", "a.1.0", "a.1.1.b", "7", "tuple"]


# --- tensors that are not dense --------------------------------------------------------------------------


ODD: dict[str, Callable[[], Tensor]] = {
    "coo": lambda: torch.eye(4).to_sparse(),
    "csr": lambda: torch.eye(4).to_sparse_csr(),
    "csc": lambda: torch.eye(4).to_sparse_csc(),
    "meta": lambda: torch.ones(4, device="meta"),
    "quantised": lambda: torch.quantize_per_tensor(torch.eye(4), 0.1, 0, torch.qint8),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
    "overlapping": lambda: torch.ones(4).as_strided((2, 3), (1, 1)),
}


@pytest.mark.parametrize("name", list(ODD))
@pytest.mark.filterwarnings("ignore:Sparse CS", "ignore:The PyTorch API of nested", "ignore:.*uantiz")
def test_a_tensor_that_is_not_dense_is_named_and_the_others_are_compared(name: str) -> None:
    odd = ODD[name]()
    for first, second in ((odd, odd), (odd, torch.eye(4)), (torch.eye(4), odd)):
        found = diff_tensors({"odd": first, "w": torch.ones(2)}, {"odd": second, "w": torch.zeros(2)})
        rows = {row.name: row for row in found.tensors}
        assert rows["w"].identical == 0.0
        assert rows["odd"].identical is None and rows["odd"].note.startswith("not compared: ")
        json.dumps(found.to_dict(), allow_nan=False)


def test_sparse_tensors_in_a_file_do_not_end_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, end in (("a.pt", 1.0), ("b.pt", 2.0)):
        torch.save({"s": torch.eye(3).to_sparse(), "w": torch.tensor([1.0, end])}, tmp_path / name)
    assert main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")]) == 0
    assert "s: not compared: it is sparse coo, and only dense tensors are compared." in capsys.readouterr().out


def test_an_expanded_tensor_of_10_to_the_12_elements_is_compared_by_what_is_stored(tmp_path: Path) -> None:
    shape = (10**6, 10**6)
    torch.save({"w": torch.ones(1).expand(shape), "v": torch.arange(3.0)[:, None].expand(3, 10**12)}, tmp_path / "a.pt")
    torch.save({"w": torch.ones(1).expand(shape), "v": torch.zeros(3, 1).expand(3, 10**12)}, tmp_path / "b.pt")
    started = time.monotonic()
    found = {row.name: row for row in diff(tmp_path / "a.pt", tmp_path / "b.pt").tensors}
    assert time.monotonic() - started < 5
    assert (found["w"].identical, found["w"].constant, found["w"].numel) == (1.0, 1.0, 10**12)
    assert found["v"].identical == pytest.approx(1 / 3)
    assert found["v"].change == pytest.approx((5 * 10**12) ** 0.5)
    assert found["v"].relative_change == pytest.approx(1.0)


def test_views_of_few_elements_that_only_look_large_are_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(10**3).as_strided((10**3 - 9, 10), (1, 1))}, tmp_path / "a.pt")
    found = diff(tmp_path / "a.pt", tmp_path / "a.pt").tensors[0]
    assert found.note == "not compared: its 9,910 elements are views of 1,000 stored ones"


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_every_dtype_torch_has_is_compared_or_says_why_not(dtype: torch.dtype) -> None:
    """A changed bit is found in every format that can be viewed as bytes."""
    try:
        # 0x3c is a finite number in every floating-point format
        raw = torch.full((64 * dtype.itemsize,), 0x3C, dtype=torch.uint8)
        first = raw.view(dtype)
    except (RuntimeError, TypeError, NotImplementedError) as error:
        pytest.skip(f"torch cannot make it: {error}")
    changed = raw.clone()
    changed[5] ^= 1
    if dtype is torch.bool:
        first, changed = torch.ones(64, dtype=torch.bool), torch.ones(64, dtype=torch.bool)
        changed[5] = False
    found = compare("w", first, changed.view(dtype))
    assert found.identical is not None and found.identical < 1, found.note
    assert compare("w", first, first).identical == 1.0


def test_numbers_too_large_to_be_squared_are_not_called_infinite() -> None:
    huge = torch.full((2,), 1e200, dtype=torch.float64)
    assert compare("w", huge, -huge).note == "its numbers are too large to be squared"
    assert compare("w", huge, -huge).identical == 0.0


# --- states of optimizers ----------------------------------------------------------------------------------


def _adam(**changes: Any) -> dict[str, Any]:
    state = {"exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4), "step": 3}
    group = {"params": [0], "betas": (0.9, 0.999)}
    return {
        "state": {0: {**state, **{key: value for key, value in changes.items() if key in state}}},
        "param_groups": [{**group, **{key: value for key, value in changes.items() if key not in state}}],
    }


def _momentum(buffer: Tensor) -> dict[str, Any]:
    return {"state": {0: {"momentum_buffer": buffer}}, "param_groups": [{"params": [0]}]}


STATES = {
    "betas": _adam(betas=3),
    "eps": _adam(eps="x"),
    "step": _adam(step="x"),
    "moments": _adam(exp_avg=3),
    "moments of two shapes": _adam(exp_avg=torch.ones(3)),
    "number in place of parameters": _adam(params=0),
    "lists as parameters": _adam(params=[[0]]),
    "group": {"state": {0: {}}, "param_groups": ["x"]},
    "state": {"state": {0: 3}, "param_groups": [{"params": [0]}]},
    "states": {"state": 3, "param_groups": 3},
    "sparse": _momentum(torch.ones(4).to_sparse()),
    "meta": _momentum(torch.ones(4, device="meta")),
    "expanded": _momentum(torch.ones(1).expand(10**6, 10**6)),
    "expanded in part": _momentum(torch.ones(9, 1).expand(9, 10**12)),
    "Adam's, expanded": _adam(
        exp_avg=torch.ones(9, 1).expand(9, 10**12), exp_avg_sq=torch.ones(9, 1).expand(9, 10**12)
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_that_is_none_is_not_known(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    path = tmp_path / "a.pt"
    torch.save({"model": {"w": torch.ones(4, dtype=torch.bfloat16)}, "optimizer": STATES[name]}, path)
    assert main(["diff", str(path), str(path), "--at", "1e-3"]) == 0
    assert "update = rate" in capsys.readouterr().out


def test_of_an_expanded_tensor_some_elements_are_looked_at(tmp_path: Path) -> None:
    ones = torch.ones(3, 1).bfloat16()
    weights = {"w": (ones * torch.tensor([[1.0], [0.5], [0.25]]).bfloat16()).expand(3, 10**12)}
    state = _momentum(torch.tensor([[0.0], [0.0], [1.0]]).expand(3, 10**12))
    torch.save({"model": weights, "optimizer": state}, tmp_path / "a.pt")
    (found,) = of_files(tmp_path / "a.pt", 2.0**-10)
    # of a gap of 2^-10 under 0.25 the whole is stored, where it alone moves
    assert (found.basis, found.efficiency) == ("optimizer state", 1.0)
    (alone,) = at_rate({"w": torch.ones(2, 10**7).bfloat16().t(), "m": torch.ones(1, device="meta").bfloat16()}, 1e-3)
    assert (alone.name, alone.efficiency) == ("w", 0.0)


def test_a_pipe_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(pipe := tmp_path / "pipe")
    torch.save({"w": torch.ones(4)}, good := tmp_path / "a.pt")
    for arguments in (
        ["diff", str(good), str(pipe)],
        ["diff", str(good), str(good), "--at", "1e-3", "--optimizer", str(pipe)],
        ["top", str(pipe)],
        ["report", str(pipe)],
    ):
        assert main(arguments) == 2
        assert "neither" in (said := capsys.readouterr().err) or "this is no file" in said


# --- names ------------------------------------------------------------------------------------------------

HOSTILE = "\x1b]0;title\x07\x1b[31mred\x9b1m\u202ereversed\r\nnew line\x00"


def test_no_escape_of_a_name_reaches_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ones = torch.ones(4, dtype=torch.bfloat16)
    first = {HOSTILE: ones, HOSTILE + "2": ones, "old" + HOSTILE: ones, "long" * 3000: ones, "nan" + HOSTILE: ones}
    second = {HOSTILE: ones, HOSTILE + "2": ones * 2, "new" + HOSTILE: ones, "long" * 3000: ones}
    second["nan" + HOSTILE] = ones * float("nan")
    torch.save(first, tmp_path / "a.pt")
    torch.save(second, tmp_path / "b.pt")
    torch.save({"other" + HOSTILE: ones}, tmp_path / "c.pt")
    evil = _safetensors(tmp_path / "d.safetensors", json.dumps({"w": {"dtype": HOSTILE}}).encode())
    for arguments in (
        ["a.pt", "b.pt"],
        ["a.pt", "c.pt"],
        ["a.pt", evil.name],
        ["a.pt", "b.pt", "--json"],
        ["a.pt", "b.pt", "--at=1e-4"],
    ):
        main(["diff", *(str(tmp_path / a) if a[0] != "-" else a for a in arguments)])
        printed = capsys.readouterr()
        for text in (printed.out, printed.err):
            assert all(c.isprintable() or c == "\n" for c in text)
            assert "new line" in text or not text or "damaged" in text
    main(["diff", str(tmp_path / "a.pt"), str(tmp_path / "b.pt")])
    assert max(map(len, capsys.readouterr().out.split("\n")[:7])) < 200


def test_tensors_compared_together_say_what_each_says_alone() -> None:
    torch.manual_seed(0)
    first, second = dict[str, Tensor](), dict[str, Tensor]()
    for dtype in DTYPES:
        for n, shape in enumerate([(), (8,), (2, 4), (8,), (0,)]):
            count = torch.Size(shape).numel() * dtype.itemsize
            bits = torch.randint(0, 256, (2, count), dtype=torch.uint8)
            bits[1, : count // 2 * (n % 2)] = bits[0, : count // 2 * (n % 2)]
            for tensors, row in ((first, bits[0]), (second, bits[1])):
                tensors[f"{dtype}.{n}"] = row.clone().view(dtype).reshape(shape) if count else torch.empty(shape)
    for n, value in enumerate((1.0, 1e200)):
        first[f"one.{n}"], second[f"one.{n}"] = torch.full((2, 1), value, dtype=torch.float64).unbind()
    names = list(first)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        together = compare_all(first, second, names)
    assert not warned
    for name, row in zip(names, together, strict=True):
        alone = compare(name, first[name], second[name])
        for field in ("change", "relative_change"):
            if (value := getattr(alone, field)) is not None:
                alone = dataclasses.replace(alone, **{field: pytest.approx(value, rel=1e-12)})
        assert row == alone
