"""Values of a report that are made when somebody asks for them: of thousands of tensors few are ever looked at in full.

A late field is as any other from outside: it compares, is printed, copied and pickled as if it had been there from the start.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")
_MAKE, _PLACE = " make", " place"  # no name of a field
Make = Callable[[int], Mapping[str, Any]]  # place -> the late fields of what is there


class _Late:
    """A field that is looked up in the instance first, and made where it is not there."""

    def __init__(self, name: str, default: Any) -> None:
        self._name, self._default = name, default

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            if self._default is dataclasses.MISSING:
                raise AttributeError(self._name)
            return self._default
        return all_of(instance)[self._name]


def allow(cls: type, names: Iterable[str]) -> None:
    """Let these fields of a dataclass be late."""
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name in names:
        setattr(cls, name, _Late(name, defaults[name]))
    cls.__getstate__ = all_of  # type: ignore[attr-defined]  # what is copied or pickled is whole


def made(cls: type[_T], fields: dict[str, Any], make: Make, place: int) -> _T:
    """An instance of which `fields` are known and the others are what `make(place)` gives, once it is asked for one."""
    fields[_MAKE], fields[_PLACE] = make, place
    return quick(cls, fields)


def maker_of(instance: Any) -> Make | None:
    """What makes the late fields of an instance, while nobody has asked for one."""
    found: Make | None = instance.__dict__.get(_MAKE)
    return found


def changed(instance: _T, **fields: Any) -> _T:
    """As `dataclasses.replace(instance, **fields)`; what is late stays so."""
    return quick(type(instance), {**instance.__dict__, **fields})


def quick(cls: type[_T], fields: dict[str, Any]) -> _T:
    """An instance of a frozen dataclass, of which every field must be given: as `cls(**fields)`, in half of the time.

    It sets fields one by one past its own lock, which costs more than judging them does.
    """
    new = object.__new__(cls)
    object.__setattr__(new, "__dict__", fields)
    return new


def all_of(instance: Any) -> dict[str, Any]:
    """All fields of an instance, in their order; from now on it holds them."""
    fields: dict[str, Any] = instance.__dict__
    make = fields.get(_MAKE)
    if make is None:
        return fields
    # several threads may do it; each does the same
    known = {**fields, **make(fields[_PLACE])}
    whole = {field.name: known[field.name] for field in dataclasses.fields(instance)}
    object.__setattr__(instance, "__dict__", whole)
    return whole
