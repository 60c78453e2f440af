"""The deterministic classifiers with which a mixture is compared: a constant, the vote, the averaged twin, a member."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mixadv.evaluation.record import EvaluationRecord, accuracy_of
from mixadv.records import CLEAN
from mixadv.results import ChosenCounterpart, Counterpart, Counterparts, VoteCounterpart
from mixadv.vote import Vote


@dataclass(frozen=True)
class Choice:
    """What of the counterparts has to be chosen, on images that do not measure them.

    constant: the class of the constant answer. member: the number of the best member. vote: with its threshold.
    chosen_on: the images, in words.
    """

    constant: int
    member: int
    vote: Vote
    chosen_on: str


def choose(record: EvaluationRecord, num_classes: int, chosen_on: str) -> Choice:
    """The most frequent class, the member with the highest robust accuracy, and for two classes the best threshold.

    Ties go to the first class, to the member that is better on clean images, and to the threshold nearest to 1/2.

    Args:
        record: of the images on which to choose.
        num_classes: C. For C > 2 the vote has no threshold: the most votes win.
        chosen_on: these images, in words.
    """
    scores = zip(record.members_worst_case().mean(1), record.clean.mean(1), strict=True)
    best = max(enumerate(scores), key=lambda one: (one[1], -one[0]))[0]
    threshold = _threshold(record) if num_classes == 2 else None
    return Choice(most_frequent(record.labels), best, Vote(tuple(record.weights.tolist()), threshold), chosen_on)


def most_frequent(labels: np.ndarray) -> int:
    """The most frequent class, of equals the first."""
    return int(np.bincount(labels).argmax())


def _threshold(record: EvaluationRecord) -> float:
    """The a of 1[sum_k lambda_k 1[f_k = 1] > a] that leaves the most images right at all points."""
    # The share of votes for the label, at the worst point.
    share, ones = record.worst_case(), record.labels == 1
    values = np.unique(np.concatenate([[0.0, 1.0], share[ones], 1 - share[~ones]]).round(9))
    middles = (values[1:] + values[:-1]) / 2
    right = [np.where(ones, share > a, share >= 1 - a).mean() for a in middles]
    return float(min(zip(middles, right, strict=True), key=lambda one: (-one[1], abs(one[0] - 0.5)))[0])


def counterparts_of(record: EvaluationRecord, choice: Choice) -> Counterparts:
    """The accuracies of the counterparts on the images of `record`, at all points found there.

    With L = 1 only that of the constant answer: the model is its own vote, twin and best member.
    """
    answers = record.labels == choice.constant
    constant = ChosenCounterpart(float(answers.mean()), accuracy_of(answers), choice.constant)
    if len(record.weights) == 1:
        return Counterparts(constant, chosen_on=choice.chosen_on)
    vote, twin, member = record.vote, record.ensemble_clean, record.clean[choice.member]
    return Counterparts(
        constant,
        VoteCounterpart(float(vote[CLEAN].mean()), accuracy_of(record.vote_worst_case()), choice.vote.threshold),
        Counterpart(float(twin.mean()), accuracy_of(record.averaged_twin_worst_case())),
        ChosenCounterpart(float(member.mean()), accuracy_of(record.members_worst_case()[choice.member]), choice.member),
        choice.chosen_on,
    )
