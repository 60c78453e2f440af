"""The deterministic counterparts of a mixture: how they are chosen, and their accuracies."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mixadv.evaluation import EvaluationRecord, choose, counterparts_of

WEIGHTS = np.array([0.5, 0.2, 0.3])


def record(labels: np.ndarray, passes: int, seed: int, weights: np.ndarray = WEIGHTS) -> EvaluationRecord:
    """A record with made-up answers: members of unlike quality, clean images and `passes` attacks."""
    rng = np.random.default_rng(seed)
    good = np.linspace(0.9, 0.6, len(weights))[:, None]

    def answers() -> np.ndarray:
        return (rng.random((len(weights), len(labels))) < good).astype(np.uint8)

    keys = [f"pgd-{i}" for i in range(passes)]
    return EvaluationRecord(
        weights=weights,
        labels=labels,
        clean=answers(),
        ensemble_clean=answers()[0],
        found={key: answers() for key in keys},
        ensemble={key: answers()[0] for key in keys},
        vote={key: answers()[-1] for key in ("clean", *keys)},
    )


def test_class_and_member_are_the_best_ones_of_the_images_that_choose() -> None:
    labels = np.repeat([2, 0, 1], [5, 9, 7])
    found = record(labels, 2, seed=0)
    chosen = choose(found, 3, "21 validation images")
    assert (chosen.constant, chosen.vote.threshold, chosen.chosen_on) == (0, None, "21 validation images")
    assert chosen.vote.weights == (0.5, 0.2, 0.3)
    # By a loop over members, images and points.
    right = [
        sum(all(points[k, i] for points in (found.clean, *found.found.values())) for i in range(21)) for k in range(3)
    ]
    assert chosen.member == int(np.argmax(right))
    assert len(set(right)) == 3


def test_of_equally_robust_members_the_one_that_is_better_on_clean_images_is_chosen() -> None:
    found = record(np.array([0, 1, 2, 2]), 1, seed=1)
    found.found["pgd-0"][:] = 0
    found.clean[:] = [[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 1, 0]]
    assert choose(found, 3, "").member == 1


@pytest.mark.parametrize("seed", range(6))
def test_for_two_classes_the_threshold_leaves_the_most_votes_right(seed: int) -> None:
    rng = np.random.default_rng(seed)
    found = record((rng.random(80) < 0.7).astype(np.int64), 2, seed)
    threshold = choose(found, 2, "").vote.threshold
    assert threshold is not None

    def right(a: float) -> int:
        """By counting: in how many images is 1[share of votes for class 1 > a] the label at every point?"""
        count = 0
        for i, label in enumerate(found.labels):
            points = [points[:, i] for points in (found.clean, *found.found.values())]
            answers = [[label if hit else 1 - label for hit in point] for point in points]
            shares = [sum(w for w, answer in zip(WEIGHTS, each, strict=True) if answer == 1) for each in answers]
            count += all((share > a) == (label == 1) for share in shares)
        return count

    # Gnecco-Heredia et al. 2023: the best threshold is at least as robust as the mixture at the same points.
    assert right(threshold) / 80 >= found.worst_case().mean() - 1e-12
    best = max(right(a) for a in np.linspace(0.005, 0.995, 100))
    assert right(threshold) == best
    # The rarer class 0 asks for a vote that says 1 easily.
    assert threshold <= 0.5


def test_accuracies_are_those_at_all_points_with_wilsons_interval() -> None:
    chosen = choose(record(np.repeat([2, 0, 1], [5, 9, 7]), 2, seed=0), 3, "21 validation images")
    found = record(np.repeat([0, 1, 2], [11, 4, 25]), 3, seed=5)
    made = counterparts_of(found, chosen)
    assert made.chosen_on == "21 validation images"

    def check(one, clean, robust) -> None:
        assert one.clean == pytest.approx(np.mean(clean))
        assert one.robust.value == pytest.approx(np.mean(robust))
        ci = stats.binomtest(int(np.sum(robust)), 40).proportion_ci(method="wilson")
        assert one.robust.ends == pytest.approx((ci.low, ci.high))

    keys = [f"pgd-{i}" for i in range(3)]
    everywhere = [all(found.vote[key][i] for key in ("clean", *keys)) for i in range(40)]
    check(made.vote, found.vote["clean"], everywhere)
    twin = [found.ensemble_clean[i] and all(found.ensemble[key][i] for key in keys) for i in range(40)]
    check(made.averaged_twin, found.ensemble_clean, twin)
    k = chosen.member
    member = [found.clean[k, i] and all(found.found[key][k, i] for key in keys) for i in range(40)]
    check(made.best_member, found.clean[k], member)
    # Chosen elsewhere: class 0 is not the most frequent one here.
    check(made.constant, found.labels == 0, found.labels == 0)
    assert (made.constant.which, made.best_member.which) == (0, k)


def test_a_single_model_is_compared_with_the_constant_answer_only() -> None:
    alone = record(np.array([0, 1, 1, 1, 2]), 1, seed=3, weights=np.array([1.0]))
    made = counterparts_of(alone, choose(alone, 3, "5 images"))
    assert (made.vote, made.averaged_twin, made.best_member) == (None, None, None)
    assert made.constant is not None
    assert made.constant.robust.value == 0.6
