"""Dataclasses to JSON and back, leniently: an entry of a wrong type becomes unknown and is reported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from mixadv.intervals import confidence_interval

T = TypeVar("T")


class Accuracy(NamedTuple):
    """A mean over test images in [0, 1] with the ends of its 95 % interval; None if unknown."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, mean: float | None, count: int | None) -> Accuracy:
        """The mean of `count` values in [0, 1], with Wilson's interval (`confidence_interval`).

        Without an interval if `count` is unknown or the mean is outside [0, 1].
        """
        if mean is None or count is None or count < 1 or not 0 <= mean <= 1:
            return cls(mean)
        return cls(mean, *confidence_interval(mean, count))

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of the interval; None if one is unknown."""
        return None if self.low is None or self.high is None else (self.low, self.high)


UNKNOWN = Accuracy()


def at(*keys: str, ends: tuple[str, ...] = (), null: bool = False) -> dict[str, Any]:
    """Metadata of a field whose place in the file differs from its name.

    Args:
        keys: the path of keys; by default the field's name.
        ends: the path of keys of an accuracy's interval.
        null: whether an unknown value is written as null; by default its key is left out.
    """
    return {"keys": keys, "ends": ends, "null": null}


def to_plain(value: Any) -> Any:
    """A dataclass, or a container of them, as plain containers."""
    if isinstance(value, (tuple, list)):
        return [to_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: to_plain(part) for key, part in value.items()}
    if not is_dataclass(value):
        return value
    content: dict[str, Any] = {}
    for one in fields(value):
        held = getattr(value, one.name)
        if isinstance(held, Accuracy):
            _put(content, _keys(one), held.value)
            _put(content, one.metadata["ends"], held.ends)
        elif one.metadata.get("null"):
            _put(content, _keys(one), held, null=True)
        elif held or one.default is None or not isinstance(held, (tuple, dict)):
            _put(content, _keys(one), held)
    return content


def _put(content: dict[str, Any], keys: tuple[str, ...], value: Any, null: bool = False) -> None:
    # Unknown values and empty objects are left out.
    if (value is None and not null) or (is_dataclass(value) and not to_plain(value)):
        return
    *folders, last = keys
    for key in folders:
        content = content.setdefault(key, {})
    content[last] = to_plain(value)


def _keys(one: Field[Any]) -> tuple[str, ...]:
    return one.metadata.get("keys") or (one.name,)


@cache
def _kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def from_plain(kind: type[T], content: Any, where: str, problems: list[str]) -> T:
    """An object of a dataclass, from plain containers.

    Args:
        kind: the dataclass. If it has a method ``fault``, which returns what is wrong with an object ("" if nothing), a
            faulty object becomes unknown.
        content: from JSON.
        where: its path in the file, for `problems`.
        problems: gets one line for each damaged entry; such an entry is unknown.
    """
    if not isinstance(content, Mapping):
        problems.append(f"{where} is not an object")
        return kind()
    types, found = _kinds(kind), {}  # type: ignore[arg-type]
    for one in fields(kind):  # type: ignore[arg-type]
        expected = types[one.name]
        if expected is Accuracy:
            value = _fraction(content, _keys(one), where, problems)
            found[one.name] = Accuracy(value, *_ends(content, one.metadata["ends"], where, problems))
        elif (value := _at(expected, content, _keys(one), where, problems)) is not None:
            found[one.name] = value
    made = kind(**found)
    if hasattr(made, "fault") and (fault := made.fault()):
        problems.append(f"{where} {fault}")
        return kind()
    return made


def _at(expected: Any, content: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> Any:
    """The entry under a path of keys; None if it is missing, null or damaged."""
    for i, key in enumerate(keys):
        if not isinstance(content, Mapping):
            problems.append(f"{_under(where, *keys[:i])} is not an object")
            return None
        content = content.get(key)
        if content is None:
            return None
    return _value(expected, content, _under(where, *keys), problems)


def _fraction(content: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> float | None:
    value: float | None = _at(float, content, keys, where, problems)
    if value is not None and not 0 <= value <= 1:
        problems.append(f"{_under(where, *keys)} is not in [0, 1]")
        return None
    return value


def _ends(content: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> tuple[float | None, float | None]:
    ends = _at(tuple[float, ...], content, keys, where, problems)
    if ends is None:
        return None, None
    if len(ends) != 2 or not 0 <= ends[0] <= ends[1] <= 1:
        problems.append(f"{_under(where, *keys)} is not an interval in [0, 1]")
        return None, None
    return ends[0], ends[1]


def _under(where: str, *keys: str) -> str:
    return ".".join(part for part in (where, *keys) if part)


def _value(expected: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the expected type; else None, and a line in `problems`."""
    parts = get_args(expected)
    if isinstance(expected, UnionType):
        return None if value is None else _value(parts[0], value, where, problems)
    if expected is Any:
        return value
    if is_dataclass(expected):
        return from_plain(expected, value, where, problems)  # type: ignore[arg-type]
    kind = get_origin(expected) or expected
    if kind is dict and isinstance(value, Mapping):
        parsed = {str(key): _value(parts[1], part, _under(where, str(key)), problems) for key, part in value.items()}
        return {key: part for key, part in parsed.items() if part is not None or parts[1] is Any}
    if kind is tuple and isinstance(value, list):
        whole = tuple(_value(parts[0], part, f"{where}[{i}]", problems) for i, part in enumerate(value))
        return None if None in whole and not isinstance(parts[0], UnionType) else whole
    # Integers beyond 64 bits may overflow a float. The comparison is False for nan.
    if kind in (int, float) and type(value) in (int, float) and abs(value) < 2**63 and kind(value) == value:
        return kind(value)
    if kind in (str, bool) and isinstance(value, kind):
        return value
    names = {dict: "an object", tuple: "a list", int: "a whole number", float: "a finite number"}
    names |= {str: "text", bool: "true or false"}
    problems.append(f"{where} is not {names[kind]}")
    return None
