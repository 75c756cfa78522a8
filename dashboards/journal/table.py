"""The table of tensors in a journal: what does not change from window to window."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from update_watch.dashboards.frame import TensorTable
from update_watch.dashboards.journal.checks import texts_of, wholes_of
from update_watch.dashboards.journal.packing import indices_line, indices_of, kinds_line, kinds_of, numbered

_KINDS = ("layer", "optimizer_group", "dtype", "shape", "numel", "trainable", "scheme")


def table_line(table: TensorTable) -> dict[str, Any]:
    digest = hashlib.sha256()
    for column in table:
        digest.update(repr(column).encode("utf-8", "surrogatepass"))
    kinds, of = numbered(table.options)  # few: of an optimizer's group
    return {
        "kind": "tensors",
        "table": digest.hexdigest()[:12],
        "name": table.name,
        "names": {str(i): names for i, names in enumerate(table.names) if names},
        **{key: kinds_line(getattr(table, key)) for key in _KINDS},
        "options": [list(one) for one in kinds],
        "options_of": indices_line(of),
    }


def table_of(line: Mapping[str, Any]) -> TensorTable:
    """The table in a "tensors" line; ValueError when it is damaged."""
    try:
        count = len(line["name"])
        table = TensorTable(
            name=texts_of(line["name"]),
            names=_other_names(line["names"], count),
            layer=kinds_of(line["layer"], texts_of),
            optimizer_group=kinds_of(line["optimizer_group"], texts_of),
            dtype=kinds_of(line["dtype"], texts_of),
            shape=kinds_of(line["shape"], _shapes_of),
            numel=kinds_of(line["numel"], _wholes),
            trainable=kinds_of(line["trainable"], lambda values: list(map(bool, values))),
            # early journals have none
            scheme=kinds_of(line["scheme"], texts_of) if "scheme" in line else ("",) * count,
            options=_options_of(line, count),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"damaged table of tensors ({error!r})") from None
    if any(len(column) != count for column in table):
        raise ValueError("damaged table of tensors (columns of different length)")
    return table


def _wholes(values: Any) -> list[int]:
    found: list[int] = wholes_of(values).tolist()
    return found


def _shapes_of(values: Any) -> Sequence[tuple[int, ...]]:
    shapes = list(map(tuple, values))
    wholes_of(itertools.chain.from_iterable(shapes))
    same = {shape: shape for shape in shapes}  # one of each is kept, not one for each tensor
    return list(map(same.__getitem__, shapes))


def _options_of(line: Mapping[str, Any], count: int) -> tuple[tuple[str, ...], ...]:
    """Of each tensor; early journals have none."""
    if "options" not in line:
        return ((),) * count
    return kinds_of(
        {"kinds": line["options"], "of": line["options_of"]}, lambda kinds: [texts_of(one) for one in kinds]
    )


def _other_names(line: Any, count: int) -> tuple[tuple[str, ...], ...]:
    names: list[tuple[str, ...]] = [()] * count
    for index, found in line.items():
        names[indices_of([int(index)], count)[0]] = texts_of(found)
    return tuple(names)
