"""Per-example results of an evaluation, and the numbers computed from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from mixadv import records
from mixadv.records import ON
from mixadv.results import Accuracy, AttackResult, Classifier, ClassResult, Results


@dataclass
class EvaluationRecord:
    """The correctness of every classifier at every point found, per example.

    A pass is one attack against one classifier: "NAME" is attack NAME against the mixture; "NAME on member k", "NAME
    on averaged twin" and "NAME on other weights j" are the same attack against its parts, or against the mixture with
    other weights. The points of every pass are replayed on all members and on the averaged twin.

    Attributes:
        weights: lambda [L], float64.
        labels: [N].
        clean: correctness of the members on the clean images [L, N].
        ensemble_clean: correctness of the averaged twin (argmax of the averaged probabilities) there [N].
        found: pass -> correctness of the members at its points [L, N].
        ensemble: pass -> correctness of the averaged twin at its points [N].
        unanswered: pass (and "clean") -> whether a logit of the member is not finite there, which counts as wrong
            [L, N].
        vote: pass (and "clean") -> correctness of the vote of the members at its points [N]; {} if it was not asked.
        seconds: pass -> wall seconds over all examples.
        worst_points: [N, ...], of each example the point of its `worst_case`, which `found_by` found.
    """

    weights: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    ensemble_clean: np.ndarray
    found: dict[str, np.ndarray] = field(default_factory=dict)
    ensemble: dict[str, np.ndarray] = field(default_factory=dict)
    unanswered: dict[str, np.ndarray] = field(default_factory=dict)
    vote: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    worst_points: Tensor | None = None

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, in their order."""
        return [key for key in self.found if ON not in key]

    def expected(self, correct: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """sum_k lambda_k correct_k, [L, N] -> float64 [N]; `weights` [L] replaces lambda."""
        return expectation(self.weights if weights is None else weights, correct)

    def points(self) -> np.ndarray:
        """Correctness of every member at the clean image and the points of all passes: [P, L, N] bool."""
        return np.stack([self.clean, *self.found.values()]).astype(bool)

    def worst_case(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Per example, the lowest exact expected accuracy over the clean image and the points of all passes: [N].

        Points found against single members count too: an attack on the mixture misses some of them, so without them
        the accuracy would be overestimated. `weights` [L] replaces lambda; the result is comparable only if the mixture
        with these weights was attacked as well.
        """
        return np.min([self.expected(correct, weights) for correct in self.points()], axis=0)

    def found_by(self) -> list[str]:
        """Per example the first pass that reached the worst case; "clean" if the clean image is the worst case."""
        names = [records.CLEAN, *self.found]
        first = np.argmin([self.expected(correct) for correct in self.points()], axis=0)
        return [names[int(index)] for index in first]

    def members_worst_case(self) -> np.ndarray:
        """Per example, whether each member is right at all points: [L, N] bool."""
        return np.all(self.points(), axis=0)

    def averaged_twin_worst_case(self) -> np.ndarray:
        """Per example, whether the averaged twin is right at all points: [N]."""
        return np.all([self.ensemble_clean, *self.ensemble.values()], axis=0)

    def vote_worst_case(self) -> np.ndarray:
        """Per example, whether the vote is right at all points: [N]."""
        return np.all(list(self.vote.values()), axis=0)

    def arrays(self) -> dict[str, np.ndarray]:
        """The content of records.npz."""
        arrays = {
            records.LABELS: self.labels,
            records.WEIGHTS: self.weights,
            records.CLEAN: self.expected(self.clean),
            records.ROBUST: self.worst_case(),
            records.FOUND_BY: np.asarray(self.found_by()),
            records.MEMBERS_ROBUST: self.members_worst_case().astype(np.uint8),
            records.TWIN_ROBUST: self.averaged_twin_worst_case().astype(np.uint8),
            records.MEMBER_CORRECT + records.CLEAN: self.clean,
        }
        if self.vote:
            arrays[records.VOTE_ROBUST] = self.vote_worst_case().astype(np.uint8)
        arrays |= {records.ATTACK + name: self.expected(self.found[name]) for name in self.attacks}
        return arrays | {records.MEMBER_CORRECT + key: correct for key, correct in self.found.items()}

    def by_class(self, names: Sequence[str]) -> tuple[ClassResult, ...]:
        """The expected accuracies of the mixture on the images of each class that occurs; `names`: of the classes."""
        clean, robust = self.expected(self.clean), self.worst_case()
        found = []
        for label in np.unique(self.labels).tolist():
            own = self.labels == label
            found.append(ClassResult(names[label], int(own.sum()), float(clean[own].mean()), float(robust[own].mean())))
        return tuple(found)

    def results(self, settings: Mapping[str, Any]) -> Results:
        """The measured part of results.json; `settings`: name of an attack -> its arguments."""
        first = self.found_by()
        members = zip(self.clean, self.members_worst_case(), strict=True)
        clean_twin = float(self.ensemble_clean.mean())
        return Results(
            L=len(self.weights),
            weights=tuple(self.weights.tolist()),
            num_examples=len(self.labels),
            clean=accuracy_of(self.expected(self.clean)),
            ensemble_accuracy=clean_twin,
            attacks={name: self._attack(name, first, settings[name]) for name in self.attacks},
            robust=accuracy_of(self.worst_case()),
            averaged_twin=Classifier(clean_twin, accuracy_of(self.averaged_twin_worst_case())),
            members=tuple(Classifier(float(clean.mean()), accuracy_of(robust)) for clean, robust in members),
        )

    def _attack(self, name: str, first: list[str], settings: Mapping[str, Any]) -> AttackResult:
        """The entry of one attack; `first` is `found_by`."""
        passes = [key for key in self.found if key == name or key.startswith(name + ON)]
        parts = [self.expected(self.found[key]) for key in passes[1:]]
        # With L = 1, attacks on the mixture are attacks on its member.
        on_member = [name if len(self.weights) == 1 else f"{name}{ON}member {k}" for k in range(len(self.weights))]
        alone = [float(self.found[key][k].mean()) if key in self.found else None for k, key in enumerate(on_member)]
        twin = f"{name}{ON}averaged twin"
        return AttackResult(
            mixture=float(self.expected(self.found[name]).mean()),
            ensemble_accuracy=float(self.ensemble[name].mean()),
            replayed_from_parts=float(np.min(parts, axis=0).mean()) if parts else None,
            members=tuple(alone),
            averaged_twin=float(self.ensemble[twin].mean()) if twin in self.ensemble else None,
            worst_found=sum(key in passes for key in first),
            seconds=round(self.seconds[name], 3),
            seconds_on_parts=round(sum(self.seconds[key] for key in passes[1:]), 3),
            settings=dict(settings),
        )


def expectation(weights: np.ndarray, correct: np.ndarray) -> np.ndarray:
    """sum_k lambda_k correct_k, [L], [L, N] -> [N] float64.

    Terms are added in the order of the members, so that equal columns give equal bits at any place: examples are
    compared between passes and batches. A sum of rounded weights above 1 is 1.
    """
    total = np.zeros(correct.shape[1:])
    for weight, right in zip(weights.tolist(), correct, strict=True):
        total += weight * right
    return np.minimum(total, 1.0)


def accuracy_of(values: np.ndarray) -> Accuracy:
    """The mean of values [N] in [0, 1], one per example, with its interval."""
    return Accuracy.of(float(values.mean()), len(values))
