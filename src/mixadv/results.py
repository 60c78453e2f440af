"""The content of results.json, its writer and its reader.

Accuracies, risks and weights are fractions in [0, 1], times are seconds. Fields have the names of their keys in the
file, unless `at` gives another path; docs/files.md lists the keys. `read` is lenient: an entry of a wrong type becomes
unknown and is reported, all other entries are kept.
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


@dataclass(frozen=True)
class Classifier:
    """A member or the averaged twin. `robust`: its accuracy at the worst of all points found in all passes."""

    clean: float | None = None
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", ends=("ci95",)))
    name: str | None = None
    source: str | None = None
    note: str | None = None


@dataclass(frozen=True)
class Attack:
    """The accuracies under one attack against each classifier, and its cost.

    Attributes:
        mixture: the exact expected accuracy.
        ensemble_accuracy: accuracy of the averaged twin at the points found against the mixture.
        replayed_from_parts: expected accuracy of the mixture at the points found against its parts.
        members, averaged_twin: accuracies of the parts, each attacked itself; None if the attack is not repeated on it.
        worst_found: number of images whose worst point was first found by this attack.
        seconds, seconds_on_parts: wall seconds of the attack on the mixture, and on its parts.
        settings: the arguments of the attack.
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
    """Values [n] of each classifier over `eps` or `steps` [n], in any order; None: unknown."""

    eps: tuple[float, ...] = ()
    steps: tuple[float, ...] = ()
    mixture: tuple[float | None, ...] = ()
    members: tuple[tuple[float | None, ...], ...] = ()
    averaged_twin: tuple[float | None, ...] = ()

    @property
    def x(self) -> tuple[float, ...]:
        return self.eps or self.steps

    def fault(self) -> str:
        """A message if the number of values differs from the number of points, else ""."""
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
    """The finite game with 0/1 losses on all points found; see `mixadv.evaluation.equilibrium_of`."""

    value_at_weights: float | None = None
    value_lp: float | None = None
    gap: float | None = None
    matching_penny_gap: float | None = None


@dataclass(frozen=True)
class Flag:
    """A reason for distrust: its name, a sentence with the numbers, and a remedy."""

    name: str = ""
    evidence: str = ""
    remedy: str = ""


@dataclass(frozen=True)
class Data:
    """The data set and the sizes of its splits."""

    name: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None


@dataclass(frozen=True)
class Fit:
    """The run of the solver in task=solve, on `num_examples` validation images."""

    num_examples: int | None = None
    solver: str | None = None
    status: str | None = None
    num_attacks: int | None = None
    num_points: int | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Certificate(Game):
    """The game on the validation images; also the risks of the best member and of equal weights."""

    best_member: float | None = None
    value_at_uniform: float | None = None


@dataclass(frozen=True)
class Row:
    """The accuracies of a single member or of a mixture in task=solve.

    Attributes:
        who: its name.
        weights: None for the optimal mixture, whose weights are `Results.weights`.
        clean, test: on the test images: clean, and at all points found.
        pool, fresh: on the validation images: at the points that chose the weights, and under new attacks.
    """

    who: str = ""
    weights: tuple[float, ...] | None = None
    clean: Accuracy = field(default=UNKNOWN, metadata=at("clean", "accuracy", ends=("clean", "ci95")))
    pool: Accuracy = field(default=UNKNOWN, metadata=at("pool", "accuracy", ends=("pool", "ci95")))
    fresh: Accuracy = field(default=UNKNOWN, metadata=at("fresh", "accuracy", ends=("fresh", "ci95")))
    test: Accuracy = field(default=UNKNOWN, metadata=at("test", "accuracy", ends=("test", "ci95")))


@dataclass(frozen=True)
class History:
    """Per round of the solver: value, best lower bound so far, weights [L]."""

    value: tuple[float | None, ...] = ()
    lower_bound: tuple[float | None, ...] = ()
    weights: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Solve:
    """The results of task=solve; `rows` holds the members, then the uniform and the optimal mixture."""

    fit: Fit = field(default_factory=Fit)
    certificate: Certificate = field(default_factory=Certificate)
    rows: tuple[Row, ...] = ()
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class Results:
    """The results of a run.

    `weights` is lambda [L], float64, as the game used it. `game` is the game on all points found. `played` holds the
    results of task=game as plain containers, under the key `game` of the file.
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
    """Write the file atomically."""
    write_text(path, json.dumps(to_json(results), indent=2) + "\n")


def read(path: Path) -> tuple[Results, list[str]]:
    """The results in a file, and one line for each damaged entry. All strings are made printable.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read.
        ValueError: it is not a JSON object.
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
    """The results in the content of a file, and one line for each damaged entry.

    Missing and damaged entries are unknown (None or empty); unknown keys are ignored.
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
    # Unknown values and empty objects are left out.
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
    """An object of the class; all unknown if `content` is not an object or has inconsistent lengths."""
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
    """The entry under a path of keys; None if it is missing, null or damaged."""
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
    """`value` as the expected type; else None, and a line in `problems`."""
    parts = get_args(expected)
    if isinstance(expected, UnionType):
        return None if value is None else _value(parts[0], value, where, problems)
    if expected is Any:
        return value
    if is_dataclass(expected):
        return _object(expected, value, where, problems)  # type: ignore[arg-type]
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
    if kind is str and isinstance(value, str):
        return value
    names = {dict: "an object", tuple: "a list", int: "a whole number", float: "a finite number", str: "text"}
    problems.append(f"{where} is not {names[kind]}")
    return None
