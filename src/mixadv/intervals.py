"""95 % confidence intervals of means over test images."""

from math import sqrt

import numpy as np

NORMAL_QUANTILE_975 = 1.959963984540054


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
    """(low, mean, high) of the differences d [N] of two accuracies on the same N examples.

    The interval is mean(d) ± z s(d) / sqrt(N), with z the normal 97.5 % quantile and s the standard deviation with
    divisor N - 1. If N = 1 its width is 0.
    """
    mean, count = float(differences.mean()), len(differences)
    half = NORMAL_QUANTILE_975 * float(differences.std(ddof=1)) / sqrt(count) if count > 1 else 0.0
    return mean - half, mean, mean + half
