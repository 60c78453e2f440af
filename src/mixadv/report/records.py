"""What runs measured image by image, as far as it can be compared."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from mixadv import records
from mixadv.report.files import Run

CLEAN, PGD, APGD, ALL = "clean", "pgd-20", "apgd", "all points"
MEMBERS, GAP = "mean of the members", "matching-penny gap"
EVEN = "equal weights"
_PGD, _APGD = records.ATTACK + PGD, records.ATTACK + "apgd-"
_READ = (records.CLEAN, records.ROBUST, records.MEMBERS_ROBUST, _PGD, records.UNIFORM_ROBUST)


class Measured(NamedTuple):
    """What one run's records say.

    Attributes:
        accuracies: measure -> expected accuracy per test image [N] float64, as far as the records have it: "clean";
            "pgd-20", "apgd" (the lower of all APGD attacks on the mixture) and "all points" (found by anyone), under
            these; "mean of the members", sum_k lambda_k of the members' own, and "matching-penny gap", what the mixture
            has above it; "equal weights", at all points, of the mixture with weights 1/L (from task=solve).
        members: of each member alone [L, N], or None.
        labels: of the images [N].
        how: data, norm, eps and attacks: numbers that differ in it are not compared.
    """

    accuracies: dict[str, np.ndarray]
    members: np.ndarray | None
    labels: np.ndarray
    how: str

    def comparable(self, other: Measured) -> bool:
        """Whether both were measured in the same way on the same images."""
        return self.how == other.how and np.array_equal(self.labels, other.labels)


def measured(run: Run) -> Measured:
    """The run's records, checked against its results.

    Raises:
        ValueError: there are no records, or they are damaged or not those of the results.
    """
    path, arrays = run.path / records.RECORDS, run.records
    if missing := [name for name in (records.LABELS, records.CLEAN, records.ROBUST) if name not in arrays]:
        raise ValueError(f"{path} has no {missing[-1]!r}")
    labels = arrays[records.LABELS]
    kept = {name: array for name, array in arrays.items() if name in _READ or name.startswith(_APGD)}
    try:
        numbers = {name: array.astype(np.float64) for name, array in kept.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{path} holds something that is not numbers") from None
    members = numbers.pop(records.MEMBERS_ROBUST, None)
    if not all(a.shape == labels.shape and a.ndim == 1 and np.isfinite(a).all() for a in numbers.values()):
        raise ValueError(f"{path} is not one finite number per image")
    if len(labels) < 2:
        raise ValueError(f"{path} has fewer than two images")
    found = {CLEAN: numbers[records.CLEAN], ALL: numbers[records.ROBUST]}
    # Stale records beside newer results would give an interval about other numbers than the table's.
    if run.robust.value is None or not abs(found[ALL].mean() - run.robust.value) <= 1e-4:
        raise ValueError(f"{path} does not belong to its results.json")
    for measure, attacks in ((PGD, [_PGD]), (APGD, [name for name in numbers if name.startswith(_APGD)])):
        if attacks and attacks[0] in numbers:
            # An attacker may leave an image as it is.
            found[measure] = np.min([found[CLEAN], *(numbers[name] for name in attacks)], axis=0)
    if records.UNIFORM_ROBUST in numbers:
        found[EVEN] = numbers[records.UNIFORM_ROBUST]
    weights = run.results.weights
    if members is not None and (not weights or members.shape != (len(weights), len(labels))):
        members = None
    if members is not None:
        found[MEMBERS] = np.asarray(weights) @ members
        found[GAP] = found[ALL] - found[MEMBERS]
    settings = {name: attack.settings for name, attack in run.results.attacks.items()}
    how = json.dumps([run.data, run.norm, run.eps, settings], sort_keys=True, default=str)
    return Measured(found, members, labels, how)
