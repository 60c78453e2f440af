"""Intervals of paired differences: their coverage where few images differ, exactly and by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from mixadv.intervals import num_differing, paired_interval
from oracles_intervals import paired_interval_by_weights

# Differences [J] on images that differ, and their probabilities: 0/1 accuracies, mixtures of equal and unequal weights,
# rare large differences among frequent small ones, and the gain of randomising, which has one sign.
DIFFERING = {
    "0/1, even": ([-1, 1], [0.5, 0.5]),
    "0/1, uneven": ([-1, 1], [0.1, 0.9]),
    "0/1, one side": ([1], [1]),
    "thirds": ([-2 / 3, -1 / 3, 1 / 3, 2 / 3], [0.2, 0.3, 0.3, 0.2]),
    "weights 0.6, 0.3, 0.1": ([-0.9, -0.6, -0.3, 0.1, 0.4], [0.1, 0.1, 0.2, 0.4, 0.2]),
    "rare large": ([-0.9, 0.1], [0.1, 0.9]),
    "one side, third": ([1 / 3], [1]),
    "halves": ([-1, -0.5, 0.5, 1], [0.1, 0.3, 0.5, 0.1]),
}
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2)


def normal(differences: np.ndarray) -> tuple[float, float, float]:
    """The interval that collapses."""
    half = 1.96 * differences.std(ddof=1) / len(differences) ** 0.5
    return differences.mean() - half, differences.mean(), differences.mean() + half


def exact_coverage(interval, count: int, share: float, positive: float) -> float:
    """The coverage for differences -1, 0, 1: a sum over the numbers of -1 and 1 in the sample."""
    truth, most = share * (2 * positive - 1), int(count * share + 8 * (count * share) ** 0.5 + 8)
    covered = 0.0
    for up, down in itertools.product(range(most), range(most)):
        rest = count - up - down
        chance = stats.multinomial.pmf([up, down, rest], count, [share * positive, share * (1 - positive), 1 - share])
        if chance > 1e-9:
            low, _, high = interval(np.repeat([1.0, -1.0, 0.0], [up, down, rest]))
            covered += chance * (low <= truth <= high)
    return covered


@pytest.mark.parametrize(("count", "share", "positive"), [(100, 0.05, 0.9), (100, 0.02, 1), (500, 0.01, 0.8)])
def test_the_coverage_is_95_percent_where_few_images_differ(count: int, share: float, positive: float) -> None:
    assert exact_coverage(paired_interval, count, share, positive) >= 0.95
    # The oracle sees an interval that is too short.
    assert exact_coverage(normal, count, share, positive) < 0.93


@pytest.mark.slow
@pytest.mark.parametrize("count", [100, 500, 2000])
@pytest.mark.parametrize("kind", DIFFERING)
def test_the_coverage_of_every_kind_of_difference(count: int, kind: str) -> None:
    values, chances = np.array([0, *DIFFERING[kind][0]]), np.array(DIFFERING[kind][1])
    rng = np.random.default_rng(count)
    for share in SHARES:
        law = np.array([1 - share, *(share * chances)])
        found = [paired_interval(np.repeat(values, drawn)) for drawn in rng.multinomial(count, law, size=8000)]
        covered = np.mean([low <= values @ law <= high for low, _, high in found])
        # Three standard errors of 8000 samples are 0.007.
        assert covered >= 0.94, (share, covered)
        # Not absurdly long: four images on each side beyond the normal interval of the true law.
        deviation = np.sqrt(values**2 @ law - (values @ law) ** 2)
        assert np.mean([high - low for low, _, high in found]) <= 2 * 1.96 * deviation / count**0.5 + 8 / count


@given(st.lists(st.sampled_from([-1.0, -2 / 3, -0.25, 0.0, 0.0, 0.1, 1.0]), min_size=1, max_size=40))
def test_the_interval_is_that_of_the_data_with_added_observations(differences: list[float]) -> None:
    given = np.array(differences)
    low, mean, high = paired_interval(given)
    assert (low, high) == pytest.approx(paired_interval_by_weights(given), abs=1e-12)
    assert mean == pytest.approx(sum(differences) / len(differences), abs=1e-12)
    assert -1 <= low <= mean <= high <= 1
    assert low < high
    assert num_differing(given) == sum(one != 0 for one in differences)
    # Exchanged, the two accuracies have the mirrored interval.
    assert paired_interval(-given) == pytest.approx((-high, -mean, -low), abs=1e-12)


def test_for_two_values_it_is_agresti_and_coulls_interval_of_a_proportion() -> None:
    # Their formula, for 7 of 20.
    z = stats.norm.ppf(0.975)
    p = (7 + z**2 / 2) / (20 + z**2)
    half = z * (p * (1 - p) / (20 + z**2)) ** 0.5
    low, _, high = paired_interval(np.repeat([1.0, -1.0], [7, 13]))
    assert (low, high) == pytest.approx((2 * (p - half) - 1, 2 * (p + half) - 1), abs=1e-12)


def test_images_that_do_not_differ_leave_room_for_those_that_a_larger_sample_would_have() -> None:
    z2 = stats.norm.ppf(0.975) ** 2
    for count in (1, 100, 2000):
        low, mean, high = paired_interval(np.zeros(count))
        assert (low, mean, high) == pytest.approx((-z2 / (count + z2), 0, z2 / (count + z2)), abs=1e-12)


def test_rounding_is_no_difference() -> None:
    weights = np.array([0.1, 0.2, 0.7])
    assert num_differing(np.array([weights.sum() - 1, 1e-7, 0.1])) == 1


@pytest.mark.parametrize("wrong", [[], [0.5, 1.5], [0.1, np.nan]])
def test_what_is_no_difference_of_accuracies_is_refused(wrong: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one example|from -1 to 1"):
        paired_interval(np.array(wrong))
