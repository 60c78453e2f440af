"""results.json: what stands in it, and the one place that writes and reads it.

Accuracies, risks and weights are fractions in [0, 1], times are seconds. The field of a class is the key in the file,
except where `at` names another place; docs/files.md lists the keys. `read` is lenient: an entry of a wrong type
becomes unknown and is named, everything else is kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

from mixadv.files import write_text
from mixadv.intervals import confidence_interval
from mixadv.redaction import all_printable

FILE = "results.json"
# 1 (version 0.1): members repeat their weights.
SCHEMA = 2

T = TypeVar("T")


class Accuracy(NamedTuple):
    """A mean over test images in [0, 1] with the ends of its 95 % interval; None for what is not known."""

    value: float | None = None
    low: float | None = None
    high: float | None = None

    @classmethod
    def of(cls, mean: float | None, count: int | None) -> Accuracy:
        """The mean of `count` values in [0, 1], with Wilson's interval (`confidence_interval`).

        There is no interval where the count is unknown or the mean is no fraction.
        """
        if mean is None or count is None or count < 1 or not 0 <= mean <= 1:
            return cls(mean)
        return cls(mean, *confidence_interval(mean, count))

    @property
    def ends(self) -> tuple[float, float] | None:
        """Both ends of the interval, if they are known."""
        return None if self.low is None or self.high is None else (self.low, self.high)


UNKNOWN = Accuracy()


def at(*keys: str, ends: tuple[str, ...] = (), null: bool = False) -> dict[str, Any]:
    """Metadata of a field that stands in the file under other keys than its name.

    Args:
        keys: one key, or a path of keys; by default the field's name.
        ends: of an accuracy, the path of its interval.
        null: an unknown value is written as null; by default its key is left out.
    """
    return {"keys": keys, "ends": ends, "null": null}


@dataclass(frozen=True)
class Classifier:
    """A member, or the averaged twin. `robust` is at the worst of all points that were found against anyone."""

    clean: float | None = None
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", ends=("ci95",)))
    name: str | None = None
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Attack:
    """What one attack did to everybody, each attacked itself, and what that cost.

    mixture: the exact expected accuracy. ensemble_accuracy: of the averaged prediction at the same points.
    replayed_from_parts: the mixture's accuracy at the points found against its parts. members, averaged_twin: their
    accuracies; None where the attack is not repeated on parts. worst_found: images whose worst point it was the first
    to find. settings: how it was called.
    """

    mixture: float | None = field(default=None, metadata=at("expected_accuracy"))
    ensemble_accuracy: float | None = None
    replayed_from_parts: float | None = field(default=None, metadata=at(null=True))
    members: tuple[float | None, ...] = ()
    averaged_twin: float | None = field(default=None, metadata=at(null=True))
    worst_found: int | None = None
    seconds: float | None = None
    seconds_on_parts: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """Values [n] of everybody over `eps` or `steps` [n], in any order; None marks a gap."""

    eps: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    mixture: tuple[float | None, ...] = ()
    members: tuple[tuple[float | None, ...], ...] = ()
    averaged_twin: tuple[float | None, ...] = ()

    @property
    def x(self) -> tuple[float, ...]:
        return self.eps or self.steps

    def fault(self) -> str:
        """What does not fit together, if anything."""
        lines = {"mixture": self.mixture, "averaged_twin": self.averaged_twin}
        lines |= {f"members[{k}]": line for k, line in enumerate(self.members)}
        wrong = [f"{len(line)} values of {name}" for name, line in lines.items() if line and len(line) != len(self.x)]
        return f"has {wrong[0]} at {len(self.x)} points" if wrong else ""


@dataclass(frozen=True)
class Curves:
    """Accuracy against eps and attack loss against steps, both on the first `num_examples` test images."""

    num_examples: int | None = None
    eps: Curve | None = None
    steps: Curve | None = None


@dataclass(frozen=True)
class Game:
    """The finite game of 0/1 losses on all points found; see `mixadv.evaluation.equilibrium_of`."""

    value_at_weights: float | None = None
    value_lp: float | None = None
    gap: float | None = None
    matching_penny_gap: float | None = None


@dataclass(frozen=True)
class Flag:
    """A reason for distrust: its name, one sentence with the numbers, and one on what to do."""

    name: str = ""
    evidence: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Data:
    """The data set and how many images of it there are."""

    name: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None


@dataclass(frozen=True)
class Fit:
    """How task=solve found the weights, on `num_examples` validation images."""

    num_examples: int | None = None
    solver: str | None = None
    status: str | None = None
    num_attacks: int | None = None
    num_points: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Certificate(Game):
    """The game on the validation images, and the risks of the best member and of equal weights in it."""

    best_member: float | None = None
    value_at_uniform: float | None = None


@dataclass(frozen=True)
class Row:
    """A member alone or a mixture, as task=solve compares them.

    weights: None for the optimal mixture, whose weights are those of the run. clean, test: on the test images, test at
    all points found. pool, fresh: on the validation images, at the points that chose the weights and under new attacks.
    """

    who: str = ""
    weights: tuple[float, ...] | None = None
    clean: Accuracy = field(default=UNKNOWN, metadata=at("clean", "accuracy", ends=("clean", "ci95")))
    pool: Accuracy = field(default=UNKNOWN, metadata=at("pool", "accuracy", ends=("pool", "ci95")))
    fresh: Accuracy = field(default=UNKNOWN, metadata=at("fresh", "accuracy", ends=("fresh", "ci95")))
    test: Accuracy = field(default=UNKNOWN, metadata=at("test", "accuracy", ends=("test", "ci95")))


@dataclass(frozen=True)
class History:
    """Per round of the solver: its value, the lower bound so far, and the weights [L]."""

    value: tuple[float | None, ...] = ()
    lower_bound: tuple[float | None, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Solve:
    """What task=solve adds: the members in `rows` come first, then equal weights, then the optimal ones."""

    fit: Fit = field(default_factory=Fit)
    certificate: Certificate = field(default_factory=Certificate)
    rows: tuple[Row, ...] = ()
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class Results:
    """What a run has found. `weights` is lambda as the game used it, float64: it stands nowhere else.

    game: of the points found. played: in a run of task=game, what that found, as plain containers; it stands in the
    file under the key `game`.
    """

    schema: int = SCHEMA
    task: str | None = None
    seed: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = field(default=None, metadata=at(null=True))
    config: dict[str, Any] = field(default_factory=dict)
    norm: str | None = field(default=None, metadata=at("threat_model", "norm"))
    eps: float | None = field(default=None, metadata=at("threat_model", "eps"))
    protocol: str | None = None
    L: int | None = None
    weights: tuple[float, ...] = ()
    num_examples: int | None = None
    clean: Accuracy = field(default=UNKNOWN, metadata=at("clean", "expected_accuracy", ends=("clean", "ci95")))
    ensemble_accuracy: float | None = field(default=None, metadata=at("clean", "ensemble_accuracy"))
    attacks: dict[str, Attack] = field(default_factory=dict)
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", "expected_accuracy", ends=("robust", "ci95")))
    averaged_twin: Classifier | None = None
    members: tuple[Classifier, ...] = ()
    game: Game | None = None
    played: dict[str, Any] | None = None
    checks: tuple[str, ...] | None = None
    curves: Curves | None = None
    flags: tuple[Flag, ...] | None = None
    solve: Solve | None = None
    data: Data = field(default_factory=Data)
    best_epoch: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    member_updates: tuple[int, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


def write(path: Path, results: Results) -> None:
    """Write the file, whole or not at all."""
    write_text(path, json.dumps(to_json(results), indent=2) + "\n")


def read(path: Path) -> tuple[Results, list[str]]:
    """The results in a file, and one line for each entry that is damaged. All text in them is printable.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is no JSON object. OSError: it cannot be read.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return from_json(all_printable(content))


def to_json(results: Results) -> dict[str, Any]:
    """The content of the file, as plain containers."""
    content = _plain(results)
    if "played" in content:
        content["game"] = content.pop("played")
    return content


def from_json(content: Mapping[str, Any]) -> tuple[Results, list[str]]:
    """The results in the content of a file, and one line for each entry that is damaged.

    What a missing or damaged entry would say is unknown (None or empty); entries that no class names are ignored.
    """
    if content.get("task") == "game":
        content = {**content, "played": content.get("game"), "game": None}
    problems: list[str] = []
    results = _object(Results, content, "", problems)
    count, members = len(results.weights), len(results.members)
    if count and members and count != members:
        problems.append(f"weights has {count} numbers for {members} members")
        results = replace(results, weights=())
    return results, list(dict.fromkeys(problems))


def _plain(value: Any) -> Any:
    """A dataclass, or a container of them, as plain containers."""
    if isinstance(value, (tuple, list)):
        return [_plain(part) for part in value]
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
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
    # What says nothing is left out.
    if (value is None and not null) or (is_dataclass(value) and not _plain(value)):
        return
    *folders, last = keys
    for key in folders:
        content = content.setdefault(key, {})
    content[last] = _plain(value)


def _keys(one: Field[Any]) -> tuple[str, ...]:
    return one.metadata.get("keys") or (one.name,)


@cache
def _kinds(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _object(kind: type[T], content: Any, where: str, problems: list[str]) -> T:
    """An object of the class; unknown throughout where `content` is no object, or where its parts do not fit."""
    if not isinstance(content, Mapping):
        problems.append(f"{where} is not an object")
        return kind()
    types, found = _kinds(kind), {}  # type: ignore[arg-type]
    for one in fields(kind):  # type: ignore[arg-type]
        expected = types[one.name]
        if expected is Accuracy:
            value = _at(float, content, _keys(one), where, problems)
            found[one.name] = Accuracy(value, *_ends(content, one.metadata["ends"], where, problems))
        elif (value := _at(expected, content, _keys(one), where, problems)) is not None:
            found[one.name] = value
    made = kind(**found)
    if isinstance(made, Curve) and (fault := made.fault()):
        problems.append(f"{where} {fault}")
        return kind()
    return made


def _at(expected: Any, content: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> Any:
    """The entry under a path of keys, None where it is missing, null or damaged."""
    for i, key in enumerate(keys):
        if not isinstance(content, Mapping):
            problems.append(f"{_under(where, *keys[:i])} is not an object")
            return None
        content = content.get(key)
        if content is None:
            return None
    return _value(expected, content, _under(where, *keys), problems)


def _ends(content: Any, keys: tuple[str, ...], where: str, problems: list[str]) -> tuple[float | None, float | None]:
    ends = _at(tuple[float, ...], content, keys, where, problems)
    if ends is not None and len(ends) != 2:
        problems.append(f"{_under(where, *keys)} is not two numbers")
    return ends if ends is not None and len(ends) == 2 else (None, None)


def _under(where: str, *keys: str) -> str:
    return ".".join(part for part in (where, *keys) if part)


def _value(expected: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the expected type; None, and a line in `problems`, where it is something else."""
    parts = get_args(expected)
    if isinstance(expected, UnionType):
        return None if value is None else _value(parts[0], value, where, problems)
    if expected is Any:
        return value
    if is_dataclass(expected):
        return _object(expected, value, where, problems)  # type: ignore[arg-type]
    kind = get_origin(expected) or expected
    if kind is dict and isinstance(value, Mapping):
        read_in = {str(key): _value(parts[1], part, _under(where, str(key)), problems) for key, part in value.items()}
        return {key: part for key, part in read_in.items() if part is not None or parts[1] is Any}
    if kind is tuple and isinstance(value, list):
        whole = tuple(_value(parts[0], part, f"{where}[{i}]", problems) for i, part in enumerate(value))
        return None if None in whole and not isinstance(parts[0], UnionType) else whole
    # Larger integers are no counts, and some are no floats; nan is not smaller than anything.
    if kind in (int, float) and type(value) in (int, float) and abs(value) < 2**63 and kind(value) == value:
        return kind(value)
    if kind is str and isinstance(value, str):
        return value
    names = {dict: "an object", tuple: "a list", int: "a whole number", float: "a finite number", str: "text"}
    problems.append(f"{where} is not {names[kind]}")
    return None
