"""Slow, obvious counterparts of the intervals."""

from __future__ import annotations

import numpy as np
from scipy import stats


def paired_interval_by_weights(differences):
    """The ends of the paired interval: numpy's weighted mean and variance of the data with the added observations."""
    z = stats.norm.ppf(0.975)
    values = np.concatenate([differences, [-1, 1]])
    weights = np.concatenate([np.ones(len(differences)), [z**2 / 2, z**2 / 2]])
    centre = np.average(values, weights=weights)
    variance = np.average((values - centre) ** 2, weights=weights)
    half = z * np.sqrt(variance / weights.sum())
    return max(-1.0, centre - half), min(1.0, centre + half)
