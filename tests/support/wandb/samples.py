"""Reports written by hand, and a reader of what an offline W&B run wrote, for the tests of the W&B sink."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from update_watch.report import (
    HEADROOM_BINS,
    HEADROOM_LOW,
    AccumulatorReport,
    Alert,
    Cause,
    Health,
    Level,
    Report,
    TensorReport,
)

START = 1_800_000_000.0  # seconds


def histogram(octave: int) -> tuple[float, ...]:
    """A headroom histogram with everything in one octave."""
    return tuple(float(i == octave - HEADROOM_LOW) for i in range(HEADROOM_BINS))


def healthy_tensor(name: str = "blocks.0.attn.weight", **fields: Any) -> TensorReport:
    defaults: dict[str, Any] = {
        "health": Health.healthy,
        "layer": name.rpartition(".")[0],
        "optimizer_group": "0/0",
        "dtype": "bfloat16",
        "shape": (30, 10),
        "numel": 300,
        "efficiency": 1.0,
        "displacement_efficiency": 0.98,
        "lost_fraction": 0.0,
        "wanted_fraction": 1.0,
        "update_ratio": 0.01,
        "applied_ratio": 0.01,
        "headroom_histogram": histogram(3),
        "lr": 1e-3,
        "critical_lr": 1e-4,
        "state_factor": 1.0,
        "accumulators": {
            "exp_avg_sq": AccumulatorReport("exp_avg_sq", "float32", Health.healthy, efficiency=0.99),
            "weight_decay": AccumulatorReport("weight_decay", "bfloat16", Health.stalled, efficiency=0.25),
        },
    }
    return TensorReport(name, **{**defaults, **fields})


def stalled_tensor(name: str = "blocks.0.norm.weight", **fields: Any) -> TensorReport:
    defaults: dict[str, Any] = {
        "health": Health.stalled,
        "cause": Cause.weight_rounding,
        "advice": "99% of the updates are under half a gap: keep this tensor in FP32.",
        "numel": 100,
        "efficiency": 0.0,
        "displacement_efficiency": 0.02,
        "lost_fraction": 0.5,
        "wanted_fraction": 0.5,
        "update_ratio": 0.001,
        "applied_ratio": 0.0,
        "headroom_histogram": histogram(-4),
        "lr": 1e-3,
        "critical_lr": 4e-3,
        "state_factor": 0.5,
        "since_step": 128,
        "accumulators": {"exp_avg_sq": AccumulatorReport("exp_avg_sq", "bfloat16", Health.stalled, efficiency=0.1)},
    }
    return healthy_tensor(name, **{**defaults, **fields})


def sample_report(step: int = 128, tensors: tuple[TensorReport, ...] | None = None, **fields: Any) -> Report:
    """One healthy and one stalled tensor, unless told otherwise."""
    defaults: dict[str, Any] = {
        "window": 128,
        "health": Health.stalled,
        "headline": "1 of 2 tensors is stalled.",
        "tensors": (healthy_tensor(), stalled_tensor()) if tensors is None else tensors,
        "time": START + step / 10,
        "cost_ms": 0.5,
    }
    return Report(step, **{**defaults, **fields})


def sample_alert(step: int = 128, title: str = "1 tensor stalled", level: Level = Level.warn) -> Alert:
    return Alert(step, level, title, "blocks.0.norm.weight is stalled: keep it in FP32.", cause=Cause.weight_rounding)


def large_model(tensors: int) -> tuple[TensorReport, ...]:
    """`tensors` tensors in layers of two, in blocks of ten."""
    return tuple(
        healthy_tensor(f"blocks.{i // 10}.part{i % 10 // 2}.{'weight' if i % 2 else 'bias'}") for i in range(tensors)
    )


class OfflineRun:
    """What an offline run wrote to its transaction log: a LevelDB record log of protobuf messages."""

    def __init__(self, run: Any) -> None:
        directory = Path(run.dir).parent
        (self.path,) = directory.glob("*.wandb")
        self.rows: list[dict[str, Any]] = []  # all of them
        self.history: list[dict[str, Any]] = []  # rows of numbers
        self.pictures: list[dict[str, Any]] = []  # rows with tables
        self.summary: dict[str, Any] = {}
        self.config: dict[str, Any] = {}
        self.metrics: dict[str, Any] = {}
        self.alerts: list[Any] = []
        for record in self._records_once_whole():
            kind = record.WhichOneof("record_type")
            if kind == "history":
                row = _items(record.history.item)
                self.rows.append(row)
                (self.pictures if _has_table(row) else self.history).append(row)
            elif kind == "summary":
                self.summary.update(_items(record.summary.update))
            elif kind == "run":  # what `wandb.init` was given
                self.config.update(_items(record.run.config.update))
            elif kind == "config":
                self.config.update(_items(record.config.update))
            elif kind == "metric":
                self.metrics[record.metric.name or record.metric.glob_name] = record.metric
            elif kind == "alert":
                self.alerts.append(record.alert)

    def _records_once_whole(self) -> list[Any]:
        # finish() of an offline run may return a little before the file is whole.
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            records = list(read_records(self.path))
            if records and records[-1].WhichOneof("record_type") == "exit":
                return records
            time.sleep(0.01)
        raise AssertionError(f"{self.path} has no exit record after 10 s")

    def read_table(self, value: dict[str, Any]) -> dict[str, Any]:
        table: dict[str, Any] = json.loads((self.path.parent / "files" / value["path"]).read_text())
        return table


def _has_table(row: dict[str, Any]) -> bool:
    return any(isinstance(v, dict) and v.get("_type") == "table-file" for v in row.values())


def read_records(path: Path) -> Iterator[Any]:
    """The whole records of a log, in order; one still being written ends them."""
    from wandb.proto import wandb_internal_pb2

    block, header, full, first, last = 32768, 7, 1, 2, 4
    data = path.read_bytes()
    position, message = header, b""
    while position + header <= len(data):
        left = block - position % block
        if left < header:  # the rest of a block is padding
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        piece = data[position + header : position + header + length]
        if len(piece) < length:  # still being written
            return
        position += header + length
        message = piece if kind in (full, first) else message + piece
        if kind in (full, last):
            record = wandb_internal_pb2.Record()  # type: ignore[attr-defined]  # made by protobuf at run time
            record.ParseFromString(message)
            yield record


def _items(items: Any) -> dict[str, Any]:
    """Protobuf items as a dict; nested keys become nested dicts, a key with dots stays one key."""
    values: dict[str, Any] = {}
    for item in items:
        path = list(item.nested_key) or [item.key]
        inner = values
        for key in path[:-1]:
            inner = inner.setdefault(key, {})
        inner[path[-1]] = json.loads(item.value_json)
    return values
