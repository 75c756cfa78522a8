"""Checkpoints compared: counts worked by hand, every kind of file, and nothing in a file is ever run."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from update_watch.checkpoints.diff import NOT_ALWAYS_A_FAULT, Diff, diff, diff_tensors
from update_watch.checkpoints.differences import TensorDiff
from update_watch.checkpoints.files import CheckpointError, read_tensors

BF16 = torch.bfloat16


def row(found: Diff, name: str) -> TensorDiff:
    (only,) = [t for t in found.tensors if t.name == name]
    return only


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    from safetensors.torch import save_file

    save_file(tensors, path, metadata)


# --- what is counted ------------------------------------------------------------------------------------


def test_share_norm_and_relative_change_are_those_worked_by_hand() -> None:
    first = torch.tensor([3.0, 4.0, 0.0, 0.0])
    second = torch.tensor([3.0, 4.0, 1.0, 2.0])
    found = row(diff_tensors({"w": first}, {"w": second}), "w")
    assert found == TensorDiff("w", "float32", 4, 0.5, math.sqrt(5), math.sqrt(5 / 25))
    assert found.has_moved


def test_bits_are_compared_not_values() -> None:
    found = row(diff_tensors({"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([-0.0, 1.0])}), "w")
    assert found.identical == 0.5
    assert found.change == 0.0


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, BF16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str
)
def test_one_changed_element_of_a_thousand_is_found_in_every_format(dtype: torch.dtype) -> None:
    first = torch.linspace(1, 2, 1000).to(dtype)
    second = first.clone()
    second[517] = -1.0
    found = row(diff_tensors({"w": first}, {"w": second}), "w")
    assert found.identical == 0.999
    assert found.change == pytest.approx(float(first[517].double() + 1), rel=1e-6)


def test_large_tensors_are_counted_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("update_watch.checkpoints.comparison._CHUNK", 7)
    first = torch.zeros(5, 20)
    second = first.clone()
    second[4, 19] = 3.0
    second[0, 0] = 4.0
    found = row(diff_tensors({"w": first}, {"w": second}), "w")
    assert (found.identical, found.change) == (0.98, 5.0)


def test_tensors_in_another_memory_layout_are_compared_by_position() -> None:
    first = torch.arange(6.0).reshape(2, 3)
    assert row(diff_tensors({"w": first}, {"w": first.t().contiguous().t()}), "w").identical == 1.0


def test_integers_have_no_norm_and_are_no_weights() -> None:
    found = diff_tensors({"n": torch.tensor([5])}, {"n": torch.tensor([5])})
    assert row(found, "n").identical == 1.0
    assert row(found, "n").change is None
    assert found.never_moved == ()


def test_formats_that_differ_are_compared_by_value() -> None:
    first = torch.tensor([1.0, 1.001])
    found = row(diff_tensors({"w": first}, {"w": first.to(BF16)}), "w")
    assert (found.dtype, found.identical) == ("float32 -> bfloat16", 0.5)


def test_complex_tensors_are_compared_by_both_parts() -> None:
    first, second = torch.tensor([1 + 1j, 2 + 2j]), torch.tensor([1 + 1j, 2 + 5j])
    found = row(diff_tensors({"w": first}, {"w": second}), "w")
    assert found.change == 3.0
    assert 0 < (found.identical or 0) < 1


@pytest.mark.parametrize(
    ("first", "second", "note"),
    [
        (torch.ones(2), torch.ones(3), "not compared: its shape (2,) became (3,)"),
        (torch.ones(2), torch.ones(2, dtype=torch.complex64), "not compared: one is complex, the other real"),
        (torch.ones(0), torch.ones(0), "not compared: it has no elements"),
        (torch.ones(2), torch.tensor([1.0, math.nan]), "it holds NaN or infinity"),
    ],
    ids=["shape", "complex", "empty", "nan"],
)
def test_what_cannot_be_compared_says_why(first: Tensor, second: Tensor, note: str) -> None:
    found = diff_tensors({"w": first}, {"w": second})
    assert row(found, "w").note == note
    assert f"w: {note}." in found.findings


# --- what is said -----------------------------------------------------------------------------------------


def test_norms_still_at_one_are_named_with_their_limits_and_the_caveat() -> None:
    first = {"norm": torch.ones(8, dtype=BF16), "w": torch.zeros(8, dtype=BF16), "head": torch.zeros(4, dtype=BF16)}
    second = {
        "norm": torch.ones(8, dtype=BF16),
        "w": torch.ones(8, dtype=BF16),
        "head": torch.eye(2).flatten().to(BF16),
    }
    found = diff_tensors(first, second)
    assert found.never_moved == ("norm",)
    assert found.findings == (
        "1 of 3 tensors never moved: norm.",
        "That one still holds exactly 1.0 in every element, as norms do when they are made, and at 1.0 BF16 loses every"
        " update under 0.002 downwards and 0.0039 upwards: if it should have been trained, its updates were probably"
        " rounded away.",
        "Of the elements of the 2 tensors that moved, 17% have the same bits in both checkpoints.",
        NOT_ALWAYS_A_FAULT,
    )
    assert "Unchanged bits are not always a fault" in NOT_ALWAYS_A_FAULT
    assert "FP32 master weights" in NOT_ALWAYS_A_FAULT


def test_a_tensor_of_zeros_that_never_moved_is_not_called_a_norm() -> None:
    zeros = {"b": torch.zeros(8, dtype=BF16), "w": torch.zeros(8, dtype=BF16)}
    found = diff_tensors(zeros, {**zeros, "w": torch.ones(8, dtype=BF16)})
    assert not any("1.0" in sentence for sentence in found.findings)


def test_in_fp32_rounding_is_not_blamed() -> None:
    found = diff_tensors({"a": torch.ones(4), "b": torch.ones(4)}, {"a": torch.ones(4), "b": torch.zeros(4)})
    assert found.findings == (
        "1 of 2 tensors never moved: a.",
        "Of the elements of the 1 tensor that moved, 0% have the same bits in both checkpoints.",
        "Rounding does not explain why 1 full-precision tensor never moved: look whether it is frozen, unused or in no"
        " optimizer (a).",
    )


def test_the_same_checkpoint_twice_is_said_to_be_the_same() -> None:
    tensors = {"a": torch.ones(4), "b": torch.randn(4)}
    assert diff_tensors(tensors, tensors).findings == ("All 2 tensors are the same to the last bit.",)


def test_a_run_in_which_everything_moved_raises_no_suspicion() -> None:
    found = diff_tensors({"a": torch.zeros(4, dtype=BF16)}, {"a": torch.ones(4, dtype=BF16)})
    assert found.findings == ("Of the elements of the 1 tensor that moved, 0% have the same bits in both checkpoints.",)


def test_tensors_of_one_checkpoint_alone_are_named() -> None:
    found = diff_tensors({"a": torch.ones(2), "old": torch.ones(2)}, {"a": torch.zeros(2), "new": torch.ones(2)})
    assert "Only in the first checkpoint: old." in found.findings
    assert "Only in the second checkpoint: new." in found.findings


def test_checkpoints_without_a_common_name_are_refused_with_examples() -> None:
    with pytest.raises(CheckpointError, match="no tensor name in common: the first has a; the second has b"):
        diff_tensors({"a": torch.ones(2)}, {"b": torch.ones(2)})


def test_the_table_puts_the_most_alike_first_and_counts_the_rest() -> None:
    first = {f"t{i}": torch.zeros(4, dtype=BF16) for i in (2, 0, 3, 1)}
    second = {f"t{i}": torch.tensor([1.0] * i + [0.0] * (4 - i)).to(BF16) for i in range(4)}
    lines = diff_tensors(first, second).text(limit=2).splitlines()
    assert lines[2].split() == ["t0", "bfloat16", "4", "100.00%", "0", "-", "all", "0"]
    assert lines[3].split() == ["t1", "bfloat16", "4", "75.00%", "1", "-"]
    assert lines[4] == "... and 2 more, less alike"


def test_the_data_are_plain_json() -> None:
    found = diff_tensors({"a": torch.ones(2), "n": torch.ones(1)}, {"a": torch.zeros(2), "n": torch.tensor([math.nan])})
    data = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [t["name"] for t in data["tensors"]] == ["a", "n"]
    assert data["tensors"][0]["identical"] == 0.0


def test_ones_whose_format_changed_are_said_to_be_of_the_later_one() -> None:
    found = diff_tensors({"w": torch.ones(4, dtype=torch.float16)}, {"w": torch.ones(4, dtype=BF16)})
    assert found.tensors[0].dtype == "float16 -> bfloat16"
    assert "That one still holds exactly 1.0 in every element" in str(found) and "at 1.0 BF16 loses" in str(found)


def test_rows_are_a_sequence_like_any_other() -> None:
    first = {"other": torch.ones(4), "odd": torch.ones(3), "same": torch.ones(4)}
    second = {"same": torch.ones(4), "other": torch.tensor([1.0, 2.0, 2.0, 2.0]), "odd": torch.ones(2)}
    first["same"], second["same"] = first["same"].to(BF16), second["same"].to(BF16)
    found = diff_tensors(first, second).tensors
    assert [t.name for t in found] == ["odd", "same", "other"] and len(found) == 3
    assert [(t.dtype, t.numel) for t in found] == [("float32", 3), ("bfloat16", 4), ("float32", 4)]
    assert found[-1] == TensorDiff("other", "float32", 4, 0.25, math.sqrt(3), math.sqrt(3 / 4))
    assert found[:2] == (found[0], found[1]) and [t.note for t in found] == [found[0].note, "", ""] != ["", "", ""]
    assert found == diff_tensors(first, second).tensors and found != diff_tensors(first, first).tensors
    assert hash(found) == hash(diff_tensors(first, second).tensors)


# --- files ------------------------------------------------------------------------------------------------


def _samples() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    kinds = [torch.float64, torch.float32, BF16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
    tensors = {str(kind): torch.randn(3, 5, generator=generator).to(kind) for kind in kinds}
    tensors |= {str(kind): torch.arange(7).to(kind) for kind in (torch.int64, torch.int32, torch.int16, torch.uint8)}
    return {**tensors, "bool": torch.tensor([True, False, True]), "scalar": torch.tensor(2.5), "none": torch.ones(0, 3)}


def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", _samples(), {"format": "pt"})
    found = read_tensors(tmp_path / "a.safetensors")
    assert found.keys() == _samples().keys()
    for name, tensor in _samples().items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].numpy(force=True).tobytes() == tensor.numpy().tobytes() if tensor.dtype in (
            torch.float64, torch.float32, torch.float16, torch.int64) else torch.equal(
            found[name].double(), tensor.double())  # fmt: skip


def test_a_folder_of_shards_is_one_checkpoint(tmp_path: Path) -> None:
    for i in range(2):
        write_safetensors(tmp_path / f"model-{i}.safetensors", {f"w{i}": torch.full((2,), float(i))})
    (tmp_path / "config.json").write_text("{}")
    assert {name: t.tolist() for name, t in read_tensors(tmp_path).items()} == {"w0": [0.0, 0.0], "w1": [1.0, 1.0]}


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model", "module", None])
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_weights_are_found_in_torch_files_beside_the_optimizer(tmp_path: Path, key: str | None, zipped: bool) -> None:
    weights = {"layer.weight": torch.ones(2, dtype=BF16)}
    content = {key: weights, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3} if key else weights
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert list(read_tensors(tmp_path / "a.pt")) == ["layer.weight"]


def test_names_of_wrappers_do_not_hide_a_match(tmp_path: Path) -> None:
    torch.save({"module._orig_mod.w": torch.ones(2)}, tmp_path / "a.pt")
    write_safetensors(tmp_path / "b.safetensors", {"w": torch.ones(2)})
    assert diff(tmp_path / "a.pt", tmp_path / "b.safetensors").never_moved == ("w",)


def test_reading_does_not_change_the_file_and_needs_no_permission_to_write(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"w": torch.ones(64)})
    path.chmod(0o444)
    before = path.read_bytes()
    read_tensors(path)["w"].add_(1)
    assert path.read_bytes() == before


class _Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_code_in_a_torch_file_is_never_run(tmp_path: Path, zipped: bool) -> None:
    target = tmp_path / "owned"
    torch.save({"w": torch.ones(2), "x": _Evil(target)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"objects other than tensors and plain data.*state_dict"):
        read_tensors(tmp_path / "a.pt")
    assert not target.exists()
    torch.load(tmp_path / "a.pt", weights_only=False)  # the same file does run code where that is allowed
    assert target.exists()


def _header(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"", "damaged: 0 bytes are too few", id="empty"),
        pytest.param(b"\xff" * 20, "damaged: a header of", id="header-beyond-the-file"),
        pytest.param(_header(b"{not json"), "damaged: Expecting property name", id="no-json"),
        pytest.param(_header(b"[1, 2]"), "damaged", id="a-list"),
        pytest.param(_header(b'{"w": {"dtype": "F32"}}'), "damaged: 'shape'", id="no-shape"),
        pytest.param(
            _header(b'{"w": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}', b"0"),
            "a format that torch does not have: 'F4'",
            id="unknown-format",
        ),
        pytest.param(
            _header(b'{"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}', b"1234"),
            r"bytes 0 to 8 cannot hold a F32 tensor of shape \[2\]",
            id="cut-short",
        ),
        pytest.param(
            _header(b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', b"1234"),
            "bytes -4 to 0 cannot hold",
            id="offset-before-the-data",
        ),
        pytest.param(
            _header(b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 4]}}', b"1234"),
            "bytes 0 to 4 cannot hold",
            id="shape-beyond-the-data",
        ),
    ],
)
def test_damaged_safetensors_are_refused_with_the_reason(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=f"a.safetensors: .*{message}"):
        read_tensors(tmp_path / "a.safetensors")


def test_a_safetensors_file_is_known_by_its_content_too(tmp_path: Path) -> None:
    (tmp_path / "model").write_bytes(_header(b'{"w": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}', b"\x07"))
    assert read_tensors(tmp_path / "model")["w"].tolist() == [7]


def test_numbers_that_are_not_aligned_are_read(tmp_path: Path) -> None:
    text = b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}'
    text += b" " * ((1 - len(text)) % 4)  # data begin at an odd place
    (tmp_path / "a.safetensors").write_bytes(_header(text, b"\x00\x00\x80\x3f"))
    assert read_tensors(tmp_path / "a.safetensors")["w"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        pytest.param("a.pt", b"hello world, not a checkpoint", "a.pt: ", id="text"),
        pytest.param("a.pt", b"", "a.pt: ", id="empty"),
        pytest.param("a.pt", b"PK\x03\x04 broken", "a.pt: ", id="broken-zip"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_tensors(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_files_without_tensors_and_folders_without_shards_are_named(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="there are no tensors in it"):
        read_tensors(tmp_path / "a.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without \*.safetensors files"):
        read_tensors(tmp_path / "empty")
    (tmp_path / "dcp").mkdir()
    (tmp_path / "dcp" / ".metadata").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="dcp_to_torch"):
        read_tensors(tmp_path / "dcp")
    with pytest.raises(FileNotFoundError, match=r"nowhere.pt: no such file"):
        read_tensors(tmp_path / "nowhere.pt")
