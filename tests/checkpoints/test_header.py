"""The header of a safetensors file, read in columns, says what a JSON reader finds in it, however it is written."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from update_watch.checkpoints.header import header_of
from update_watch.checkpoints.stored import stored_file

Said = dict[str, tuple[Any, list[Any], list[int]]]


def entry(dtype: str = "BF16", shape: str = "8", place: str = "0,16") -> str:
    return f'{{"dtype":"{dtype}","shape":[{shape}],"data_offsets":[{place}]}}'


def by_json(text: bytes) -> Said:
    """Name -> format, lengths, place: the slow, honest twin."""
    header = json.loads(text)
    header.pop("__metadata__", None)
    for one in header.values():
        if any(type(at) is not int for at in one["data_offsets"]) or len(one["data_offsets"]) != 2:
            raise ValueError("no place")
    return {name: (one["dtype"], list(one["shape"]), one["data_offsets"]) for name, one in header.items()}


def in_columns(text: bytes) -> Said:
    found = header_of(text)
    kinds = [found.kinds[code] for code in found.codes.tolist()]
    said = zip(found.names, kinds, found.places.tolist(), strict=True)
    return {name: (dtype, list(lengths), place) for name, (dtype, *lengths), place in said}


USUAL = f'{{"a":{entry()},"b.c":{entry("F32", "4,2", "16,48")},"d":{entry("F32", "", "48,52")},"e":{entry()}}}'
OTHERS = {
    "usual": USUAL,
    "padded": USUAL + "   ",
    "with metadata": '{"__metadata__":{"format":"pt","x":"}"},' + USUAL[1:],
    "with deep metadata": '{"__metadata__":{"format":{"a":"b"}},' + USUAL[1:],
    "with metadata that are a list": '{"__metadata__":[1],' + USUAL[1:],
    "metadata alone": '{"__metadata__":{"format":"pt"}}',
    "metadata behind": USUAL[:-1] + ',"__metadata__":{"format":"pt"}}',
    "a tensor called so": f'{{"a":{entry()},"__metadata__":{entry()}}}',
    "blanks": json.dumps(json.loads(USUAL)),
    "another order": f'{{"a":{{"shape":[8],"dtype":"BF16","data_offsets":[0,16]}},"b":{entry()}}}',
    "more is said": USUAL.replace('"dtype"', '"x":1,"dtype"'),
    "an escape": f'{{"a\\n":{entry()}}}',
    "escapes": f'{{"a\\n":{entry()},"b\\"":{entry()},"\\u00e9":{entry()}}}',
    "no ASCII": f'{{"é":{entry()},"{chr(0x1F600)}":{entry()}}}',
    "a name twice": f'{{"a":{entry()},"b":{entry()},"a":{entry("F32")}}}',
    "no name": f'{{"":{entry()}}}',
    "names of signs": f'{{"]}},":{entry()},"{{[:,":{entry("")}}}',
    "a length that is none": f'{{"a":{entry(shape="2.5")}}}',
    "lengths within lengths": f'{{"a":{entry(shape="[2]")}}}',
    "a place with a leading zero": f'{{"a":{entry(place="00,16")}}}',
    "a place of three": f'{{"a":{entry(place="0,16,3")},"b":{entry(place="7")}}}',
    "a place that is none": f'{{"a":{entry(place="0,16.0")}}}',
    "a place within one": f'{{"a":{entry(place="[0,16]")}}}',
    "a place that is true": f'{{"a":{entry(place="true,16")}}}',
    "a place below 0": f'{{"a":{entry(place="-16,0")}}}',
    "parts that changed places": '{"a":{"dtype":"BF16],"data_offsets":[8","shape":[0,16]}}',
    "parts of two that changed places": f'{{"a":{{"dtype":"BF16","shape":[8]}},"0,16],"data_offsets":[b":{entry()}}}',
    "no entry": '{"x","shape":[y":{"dtype":"BF16],"data_offsets":[0,16]}}',
    "what stands for a part": USUAL.replace('":{"dtype":"', "\x01"),
    "metadata without a comma": '{"__metadata__":{"format":"pt"};' + USUAL[1:],
    "a control character": f'{{"a\x02b":{entry()}}}',
    "nothing": "{}",
    "cut short": USUAL[:-1],
    "goes on": USUAL + "}",
}


@pytest.mark.parametrize("name", OTHERS)
def test_a_header_says_the_same_however_it_is_written(name: str) -> None:
    text = OTHERS[name].encode()
    try:
        wanted = by_json(text)
    except (ValueError, KeyError, TypeError, AttributeError):
        with pytest.raises((ValueError, KeyError, TypeError, AttributeError)):
            in_columns(text)
    else:
        assert in_columns(text) == wanted and list(in_columns(text)) == list(wanted)


def test_no_changed_byte_makes_it_say_what_is_not_there() -> None:
    generator = random.Random(0)
    texts = [OTHERS["usual"].encode(), OTHERS["with metadata"].encode()]
    read = 0
    for _ in range(6_000):
        text = bytearray(generator.choice(texts))
        for _ in range(generator.choice((1, 1, 2))):
            at = generator.randrange(len(text))
            part = text[(begin := generator.randrange(len(text))) : begin + generator.choice((1, 1, 9, 30))]
            text[at : at + generator.choice((0, 1, len(part)))] = generator.choice(
                (part, b"\x01", b" ", b'"', b"7", b"")
            )
        try:
            found = in_columns(bytes(text))
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError):
            continue
        assert found == by_json(bytes(text)), bytes(text)
        read += 1
    assert read > 500


def test_what_the_formats_own_library_writes_is_read_without_an_object_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"layers.{i}.weight": torch.full((i % 3 + 1,), float(i)) for i in range(40)}
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    raw = (tmp_path / "a.safetensors").read_bytes()
    text = raw[8 : 8 + int.from_bytes(raw[:8], "little")]
    wanted = by_json(text)
    longest = []
    loads = json.loads
    monkeypatch.setattr(json, "loads", lambda text: longest.append(str(text).count("{")) or loads(text))
    assert in_columns(text) == wanted
    assert max(longest) <= 1  # the metadata


def test_a_tensor_that_lies_elsewhere_is_named_with_its_place() -> None:
    header = header_of(f'{{"a":{entry()},"b":{entry("F32", "2,2", "16,24")}}}'.encode())
    with pytest.raises(ValueError, match=r"^bytes 16 to 24 cannot hold a F32 tensor of shape \[2, 2\]$"):
        stored_file(memoryview(bytes(100)), 0, header)  # type: ignore[arg-type]  # of the file it asks for the length
