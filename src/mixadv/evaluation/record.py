"""What was found about a mixture, example by example, and the numbers that follow from it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixadv import records
from mixadv.records import ON
from mixadv.results import Accuracy, Attack, Classifier, Results


@dataclass
class EvaluationRecord:
    """What was found, per example, so that every number can be computed again.

    A pass is one attack against one classifier: "NAME" is attack NAME against the mixture, "NAME on member k",
    "NAME on averaged twin" and "NAME on other weights j" are the same attack against parts or variants of it. Points
    of every pass were replayed on everybody.

    Attributes:
        weights: lambda [L], float64. labels: [N].
        clean: per-member correctness [L, N] on the clean images.
        ensemble_clean: [N], correctness of the argmax of the averaged probabilities.
        found: pass -> per-member correctness [L, N] at its points.
        ensemble: pass -> [N], the averaged prediction at the same points.
        seconds: pass -> wall seconds over all examples.
        images: pass (and "clean") -> the first attacked images [K, C, H, W].
    """

    weights: np.ndarray
    labels: np.ndarray
    clean: np.ndarray
    ensemble_clean: np.ndarray
    found: dict[str, np.ndarray] = field(default_factory=dict)
    ensemble: dict[str, np.ndarray] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    images: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def attacks(self) -> list[str]:
        """Names of the attacks, in their order."""
        return [key for key in self.found if ON not in key]

    def expected(self, correct: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """sum_k lambda_k correct_k: [L, N] -> float64 [N], with `weights` in the place of lambda where given."""
        return (self.weights if weights is None else weights) @ correct.astype(np.float64)

    def points(self) -> np.ndarray:
        """Correctness of every member at every point found by anyone, the clean image first: [P, L, N] bool."""
        return np.stack([self.clean, *self.found.values()]).astype(bool)

    def worst_case(self, weights: np.ndarray | None = None) -> np.ndarray:
        """Per example, the lowest exact expected accuracy over all points found by anyone: [N].

        Points found against a single member are replayed on the mixture: an attack on the mixture misses some of
        them, and leaving them out would overstate it. Other `weights` [L] may be asked for; they are judged fairly
        only if they were attacked as well.
        """
        return np.min([self.expected(correct, weights) for correct in self.points()], axis=0)

    def found_by(self) -> list[str]:
        """Per example the first pass that reached the worst case, "clean" where x itself is."""
        names = [records.CLEAN, *self.found]
        first = np.argmin([self.expected(correct) for correct in self.points()], axis=0)
        return [names[int(index)] for index in first]

    def members_worst_case(self) -> np.ndarray:
        """Per example, whether each member survives all points found by anyone: [L, N] bool."""
        return np.all(self.points(), axis=0)

    def averaged_twin_worst_case(self) -> np.ndarray:
        """Per example, whether the argmax of the averaged probabilities survives all points found by anyone: [N]."""
        return np.all([self.ensemble_clean, *self.ensemble.values()], axis=0)

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
        arrays |= {records.ATTACK + name: self.expected(self.found[name]) for name in self.attacks}
        return arrays | {records.MEMBER_CORRECT + key: correct for key, correct in self.found.items()}

    def results(self, settings: Mapping[str, Any]) -> Results:
        """The measured part of results.json; `settings` maps attack names to what they were called with."""
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

    def _attack(self, name: str, first: list[str], settings: Mapping[str, Any]) -> Attack:
        """Accuracies of everybody under one attack against them, what its replayed points add, and what it cost."""
        passes = [key for key in self.found if key == name or key.startswith(name + ON)]
        parts = [self.expected(self.found[key]) for key in passes[1:]]
        # A single model is its own only member.
        on_member = [name if len(self.weights) == 1 else f"{name}{ON}member {k}" for k in range(len(self.weights))]
        alone = [float(self.found[key][k].mean()) if key in self.found else None for k, key in enumerate(on_member)]
        twin = f"{name}{ON}averaged twin"
        return Attack(
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


def accuracy_of(values: np.ndarray) -> Accuracy:
    """The mean of values [N] in [0, 1], one per example, with its interval."""
    return Accuracy.of(float(values.mean()), len(values))
