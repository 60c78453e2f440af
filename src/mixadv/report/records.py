"""The per-image accuracies in records.npz, checked against results.json."""

from __future__ import annotations

import json
from typing import NamedTuple

import numpy as np

from mixadv import records
from mixadv.report.attacks import TWIN
from mixadv.report.files import Run

CLEAN, PGD, APGD, ALL = "clean", "pgd-20", "apgd", "all points"
MEMBERS, GAP = "mean of the members", "matching-penny gap"
EVEN = "equal weights"
# Counterparts; the averaged twin and the best member are the other two.
VOTE, CONSTANT = "vote", "constant answer"
_PGD, _APGD = records.ATTACK + PGD, records.ATTACK + "apgd-"
_READ = (
    *(records.CLEAN, records.ROBUST, records.MEMBERS_ROBUST, records.VOTE_ROBUST, records.TWIN_ROBUST),
    *(_PGD, records.UNIFORM_ROBUST),
)


class Measured(NamedTuple):
    """Accuracies of one run per test image.

    Attributes:
        accuracies: measure -> [N] float64. Measures that the records lack are left out:

            - "clean": expected accuracy a_i of the mixture on the clean image;
            - "pgd-20", "apgd", "all points": its minimum over the clean image and the points of PGD-20, of all APGD
              attacks on the mixture, of all passes;
            - "mean of the members": m_i = sum_k lambda_k r_ki, where r_ki = 1 if member k is right at all points;
            - "matching-penny gap": "all points" minus m_i;
            - "equal weights": "all points" for the mixture with weights 1/L (only task=solve).
        members: r [L, N], or None.
        counterparts: "vote", "averaged twin" and "constant answer" -> whether it is right at all points found [N].
        labels: [N].
        how: data, norm, eps and attacks as text. Runs are comparable only if it is equal.
    """

    accuracies: dict[str, np.ndarray]
    members: np.ndarray | None
    counterparts: dict[str, np.ndarray]
    labels: np.ndarray
    how: str

    def comparable(self, other: Measured) -> bool:
        """Whether both have the same data, threat model, attacks and images."""
        return self.how == other.how and np.array_equal(self.labels, other.labels)


def measured(run: Run) -> Measured:
    """The records of a run.

    Raises:
        ValueError: they are missing or damaged, or do not match the results.
    """
    path, arrays = run.path / records.RECORDS, run.records
    if missing := [name for name in (records.LABELS, records.CLEAN, records.ROBUST) if name not in arrays]:
        raise ValueError(f"{path} has no {missing[-1]!r}")
    labels = arrays[records.LABELS]
    kept = {name: array for name, array in arrays.items() if name in _READ or name.startswith(_APGD)}
    try:
        numbers = {name: array.astype(np.float64) for name, array in kept.items()}
    except (TypeError, ValueError):
        raise ValueError(f"{path} has an array that is not numeric") from None
    members = numbers.pop(records.MEMBERS_ROBUST, None)
    if not all(a.shape == labels.shape and a.ndim == 1 and np.isfinite(a).all() for a in numbers.values()):
        raise ValueError(f"{path} has an array that is not one finite number per image")
    if len(labels) < 2:
        raise ValueError(f"{path} has fewer than two images")
    found = {CLEAN: numbers[records.CLEAN], ALL: numbers[records.ROBUST]}
    # Records of an older run beside new results would give intervals that do not fit the table.
    if run.robust.value is None or not abs(found[ALL].mean() - run.robust.value) <= 1e-4:
        raise ValueError(f"{path} does not match the results.json beside it")
    for measure, attacks in ((PGD, [_PGD]), (APGD, [name for name in numbers if name.startswith(_APGD)])):
        if attacks and attacks[0] in numbers:
            # The attacker may keep the clean image.
            found[measure] = np.min([found[CLEAN], *(numbers[name] for name in attacks)], axis=0)
    if records.UNIFORM_ROBUST in numbers:
        found[EVEN] = numbers[records.UNIFORM_ROBUST]
    names = {VOTE: records.VOTE_ROBUST, TWIN: records.TWIN_ROBUST}
    counterparts = {name: numbers[array] for name, array in names.items() if array in numbers}
    known = run.results.counterparts
    if known is not None and known.constant is not None and known.constant.which is not None:
        counterparts[CONSTANT] = (labels == known.constant.which).astype(np.float64)
    weights = run.results.weights
    if members is not None and members.shape != (len(weights), len(labels)):
        members = None
    if members is not None:
        found[MEMBERS] = np.asarray(weights) @ members
        found[GAP] = found[ALL] - found[MEMBERS]
    settings = {name: attack.settings for name, attack in run.results.attacks.items()}
    how = json.dumps([run.data, run.norm, run.eps, settings], sort_keys=True, default=str)
    return Measured(found, members, counterparts, labels, how)
