"""The content of results.json, its writer and its reader.

Accuracies, risks and weights are fractions in [0, 1], times are seconds. Fields have the names of their keys in the
file, unless `at` gives another path; docs/files.md lists the keys. `read` is lenient: an entry of a wrong type becomes
unknown and is reported, all other entries are kept.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mixadv.files import write_text
from mixadv.redaction import all_printable
from mixadv.typed_json import UNKNOWN, Accuracy, at, from_plain, to_plain

FILE = "results.json"
# 1 (version 0.1): members repeat their weights.
SCHEMA = 2


@dataclass(frozen=True)
class Classifier:
    """A member or the averaged twin. `robust`: its accuracy at the worst of all points found in all passes.

    `bias` [C]: is added to its logits, see `mixadv.biased`; () for none.
    """

    clean: float | None = None
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", ends=("ci95",)))
    name: str | None = None
    source: str | None = None
    note: str | None = None
    bias: tuple[float, ...] = ()


@dataclass(frozen=True)
class Counterpart:
    """A deterministic classifier beside the mixture: its accuracies on clean images, and at the worst of all points."""

    clean: float | None = None
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", ends=("ci95",)))


@dataclass(frozen=True)
class ChosenCounterpart(Counterpart):
    """`which`: the class of the constant answer, or the number of the best member."""

    which: int | None = None


@dataclass(frozen=True)
class VoteCounterpart(Counterpart):
    """`threshold`: of `mixadv.vote.Vote`, for two classes."""

    threshold: float | None = field(default=None, metadata=at(null=True))


@dataclass(frozen=True)
class Counterparts:
    """The deterministic classifiers with which a mixture is compared; see `mixadv.evaluation.counterparts`.

    `chosen_on`: the images on which class, member and threshold were chosen, in words. If L = 1 there is only the
    constant answer.
    """

    constant: ChosenCounterpart | None = None
    vote: VoteCounterpart | None = None
    averaged_twin: Counterpart | None = None
    best_member: ChosenCounterpart | None = None
    chosen_on: str | None = None


@dataclass(frozen=True)
class ClassResult:
    """The mixture on the measured images of one class: their number, and the expected accuracies."""

    name: str = ""
    num_examples: int | None = None
    clean: float | None = None
    robust: float | None = None


@dataclass(frozen=True)
class AttackResult:
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
class GameValue:
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
    """The data set, the sizes of its splits, and how much was not read of what it was read from, by reason."""

    name: str | None = None
    num_train: int | None = None
    num_val: int | None = None
    num_test: int | None = None
    left_out: dict[str, int] = field(default_factory=dict)


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
class Certificate(GameValue):
    """The game on the validation images; also the risks of the best member and of equal weights."""

    best_member: float | None = None
    value_at_uniform: float | None = None


@dataclass(frozen=True)
class SolveRow:
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
    rows: tuple[SolveRow, ...] = ()
    history: History = field(default_factory=History)


@dataclass(frozen=True)
class GrowthStage:
    """The game after a stage of a growing mixture, on validation images, see `mixadv.training.growth.Stage`."""

    member: int | None = None
    value: float | None = None
    lower_bound: float | None = None
    value_without: float | None = field(default=None, metadata=at(null=True))
    kept: bool | None = None
    weights: tuple[float, ...] = ()
    num_images: int | None = None
    num_points: int | None = None


@dataclass(frozen=True)
class CeilingRow:
    """The game over all classifiers on `num_examples` images at one radius, see `mixadv.game.Ceiling`.

    `in_conflict` is the share of the images that conflict with one of another class. `pairs`: None if there are too
    many to be listed. The optima are None where they were not computed.
    """

    eps: float | None = None
    num_examples: int | None = None
    in_conflict: float | None = None
    pairs: int | None = field(default=None, metadata=at(null=True))
    randomised: float | None = field(default=None, metadata=at(null=True))
    randomised_upper: float | None = field(default=None, metadata=at(null=True))
    deterministic: float | None = field(default=None, metadata=at(null=True))
    deterministic_upper: float | None = field(default=None, metadata=at(null=True))
    gain_at_most: float | None = field(default=None, metadata=at(null=True))
    status: str | None = None
    seconds: float | None = None


@dataclass(frozen=True)
class Results:
    """The results of a run.

    `date` is when the results were complete, in UTC; `command` has the words of the command line, quoted for a shell.
    `content` is a digest of what was measured and how: parameters, weights, images, ball, protocol and seed.
    `training` holds the settings with which a measured mixture was trained, as it records them.
    `weights` is lambda [L], float64, as the game used it. `game` is the game on all points found. `played` holds the
    results of task=game as plain containers, under the key `game` of the file. `answers` of task=predict: class ->
    number of images with this answer; "" stands for no answer.
    """

    schema: int = SCHEMA
    task: str | None = None
    seed: int | None = None
    device: str | None = None
    versions: dict[str, str] = field(default_factory=dict)
    git: str | None = field(default=None, metadata=at(null=True))
    date: str | None = None
    command: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    content: str | None = None
    norm: str | None = field(default=None, metadata=at("threat_model", "norm"))
    eps: float | None = field(default=None, metadata=at("threat_model", "eps"))
    protocol: str | None = None
    L: int | None = None
    weights: tuple[float, ...] = ()
    num_examples: int | None = None
    clean: Accuracy = field(default=UNKNOWN, metadata=at("clean", "expected_accuracy", ends=("clean", "ci95")))
    ensemble_accuracy: float | None = field(default=None, metadata=at("clean", "ensemble_accuracy"))
    attacks: dict[str, AttackResult] = field(default_factory=dict)
    robust: Accuracy = field(default=UNKNOWN, metadata=at("robust", "expected_accuracy", ends=("robust", "ci95")))
    averaged_twin: Classifier | None = None
    members: tuple[Classifier, ...] = ()
    counterparts: Counterparts | None = None
    classes: tuple[ClassResult, ...] = ()
    game: GameValue | None = None
    played: dict[str, Any] | None = None
    checks: tuple[str, ...] | None = None
    curves: Curves | None = None
    flags: tuple[Flag, ...] | None = None
    answers: dict[str, int] = field(default_factory=dict)
    solve: Solve | None = None
    first_conflict_eps: float | None = None
    ceiling: tuple[CeilingRow, ...] = ()
    data: Data = field(default_factory=Data)
    best_epoch: float | None = None
    validation: dict[str, float] = field(default_factory=dict)
    member_updates: tuple[int, ...] = ()
    stages: tuple[GrowthStage, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)


def write(path: Path, results: Results) -> None:
    """Write the file atomically."""
    write_text(path, json.dumps(to_json(results), indent=2, allow_nan=False) + "\n")


def read(path: Path) -> tuple[Results, list[str]]:
    """The results in a file, and one line for each damaged entry. All strings are made printable.

    Raises:
        FileNotFoundError: the file does not exist.
        OSError: it cannot be read.
        ValueError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError("not a JSON object")
    return from_json(all_printable(content))


def to_json(results: Results) -> dict[str, Any]:
    """The content of the file, as plain containers."""
    content = to_plain(results)
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
    results = from_plain(Results, content, "", problems)
    if fault := _fault_of_weights(results):
        problems.append(fault)
        results = replace(results, weights=())
    return results, list(dict.fromkeys(problems))


def _fault_of_weights(results: Results) -> str:
    weights, members = results.weights, len(results.members)
    if weights and members and len(weights) != members:
        return f"weights has {len(weights)} numbers for {members} members"
    # Weights of version 0.1 were rounded to float32.
    if weights and not (min(weights) >= 0 and abs(sum(weights) - 1) <= 1e-6):
        return "weights are not a distribution"
    return ""
