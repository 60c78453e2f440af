"""95 % confidence intervals of means over test images."""

from math import sqrt

import numpy as np

NORMAL_QUANTILE_975 = 1.959963984540054
# Records of version 0.1 hold sums of weights in float32.
ROUNDING = 1e-6


def confidence_interval(mean: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % score interval for the mean of `count` values in [0, 1].

    The interval assumes binomial variance, the largest that values in [0, 1] with this mean can have, so it is
    conservative for the fractional accuracies of a mixture. Unlike the normal interval it has a positive width at
    means 0 and 1. Source: E. B. Wilson, J. Am. Stat. Assoc. 22 (1927).

    Raises:
        ValueError: count < 1.
    """
    if count < 1:
        raise ValueError("an interval needs at least one example")
    z2 = NORMAL_QUANTILE_975**2
    centre = (mean + z2 / (2 * count)) / (1 + z2 / count)
    half = NORMAL_QUANTILE_975 * sqrt(mean * (1 - mean) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    # At 0 and 1 the two terms cancel in real numbers, but not in floating point.
    low = 0.0 if mean == 0 else max(0.0, centre - half)
    high = 1.0 if mean == 1 else min(1.0, centre + half)
    return low, high


def paired_interval(differences: np.ndarray) -> tuple[float, float, float]:
    """(low, mean, high): the mean of the differences d [N] of two accuracies, in [-1, 1], with its 95 % interval.

    It is the normal interval after adding z^2 / 2 observations of -1 and as many of 1, z = 1.96: with n = N + z^2,
    centre c = sum(d) / n and variance v = (sum(d^2) + z^2) / n - c^2 it is c ± z sqrt(v / n), cut at ±1. The added
    observations stand for the large differences that a sample may lack if few images differ. Without them the interval
    covers the truth in as few as 60 % of samples if 1 % of 100 to 500 images differ, and may be a single point.

    For one proportion this is the interval of Agresti and Coull (Am. Stat. 52, 1998). Bonett and Price (J. Educ. Behav.
    Stat. 37, 2012) carry that idea over to paired proportions, with one observation on each side. The number z^2 / 2
    and the use for fractional differences rest on the simulations in tests/test_intervals.py.

    Raises:
        ValueError: N < 1, or a difference is outside [-1, 1].
    """
    count, z2 = len(differences), NORMAL_QUANTILE_975**2
    if count < 1:
        raise ValueError("an interval needs at least one example")
    if not (np.abs(differences) <= 1 + ROUNDING).all():
        raise ValueError("differences of accuracies are numbers from -1 to 1")
    centre = float(differences.sum()) / (count + z2)
    variance = (float(np.square(differences).sum()) + z2) / (count + z2) - centre**2
    half = NORMAL_QUANTILE_975 * sqrt(max(0.0, variance) / (count + z2))
    return max(-1.0, centre - half), float(differences.mean()), min(1.0, centre + half)


def num_differing(differences: np.ndarray) -> int:
    """The number of examples whose two accuracies differ by more than rounding."""
    return int((np.abs(differences) > ROUNDING).sum())
