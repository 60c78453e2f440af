"""Is the mixture better than its baseline? A difference of robust accuracies with its interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mixadv.intervals import paired_interval
from mixadv.report.files import Run
from mixadv.report.records import ALL, measured


class Comparison(NamedTuple):
    """Robust accuracy of the mixture minus that of its baseline, with a 95 % interval.

    Attributes:
        difference, low, high: fractions.
        paired: whether it was computed example by example.
        num_examples: test images of the pairing, or of the mixture's evaluation.
        note: why it is not paired, else "".
    """

    difference: float
    low: float
    high: float
    paired: bool
    num_examples: int | None
    note: str

    def in_points(self) -> tuple[str, str, str]:
        """Difference and ends of the interval as signed percentage points."""
        return f"{100 * self.difference:+.1f}", f"{100 * self.low:+.1f}", f"{100 * self.high:+.1f}"

    def in_words(self) -> str:
        """Difference and interval as they stand in a sentence."""
        points, low, high = self.in_points()
        return f"{points} points, 95 % interval [{low}, {high}]"

    def verdict(self, higher: str, lower: str) -> str:
        """`higher` or `lower` where the whole interval is on that side of 0, else that no difference is shown."""
        if self.low > 0:
            return higher
        return lower if self.high < 0 else "no difference is shown"


def compare(run: Run) -> Comparison | None:
    """Mixture against its baseline; None without a baseline or without results of both.

    With per-example robust accuracies a_i, b_i over the same N >= 2 test images the interval is paired, on
    d_i = a_i - b_i:  mean(d) ± z s(d) / sqrt(N), s with N - 1. Otherwise it is the normal approximation for
    independent estimates, half width sqrt(h_a^2 + h_b^2) from the half widths of the two intervals: wider,
    since it ignores that both were measured on the same images. Either covers the draw of the test images,
    not that of the training seed.
    """
    other = run.baseline
    if other is None or run.robust.value is None or other.robust.value is None:
        return None
    try:
        mine, theirs = measured(run), measured(other)
        if not np.array_equal(mine.labels, theirs.labels):
            raise ValueError("the two were evaluated on different test images")
        return paired(mine.accuracies[ALL] - theirs.accuracies[ALL])
    except ValueError as error:
        note = str(error)
    difference = run.robust.value - other.robust.value
    half_widths = [(r.high - r.low) / 2 for r in (run.robust, other.robust) if r.low is not None and r.high is not None]
    half = math.hypot(*half_widths) if len(half_widths) == 2 else math.nan
    return Comparison(difference, difference - half, difference + half, False, run.num_examples, note)


def compare_with_best_member(run: Run) -> tuple[int, Comparison] | None:
    """The mixture against its member with the highest robust accuracy on these images, paired; None if L < 2.

    Choosing the member on the same images favours it a little. None also where the records do not hold
    every member's accuracies for the images of the results.
    """
    try:
        found = measured(run)
    except ValueError:
        return None
    if found.members is None or len(found.members) < 2:
        return None
    best = int(found.members.mean(axis=1).argmax())
    return best, paired(found.accuracies[ALL] - found.members[best])


def paired(differences: np.ndarray) -> Comparison:
    """The comparison of differences d [N] per example, see `paired_interval`."""
    low, mean, high = paired_interval(differences)
    return Comparison(mean, low, high, True, len(differences), "")


def member_sentence(run: Run) -> str:
    """One sentence: mixture minus its best member; "" where there is nothing to compare."""
    found = compare_with_best_member(run)
    if found is None:
        return ""
    best, result = found
    verdict = result.verdict(
        "the mixture is more robust than any of its members alone",
        "its best member alone is more robust than the mixture",
    )
    return f"Mixture minus its best member (member {best}): {result.in_words()}: {verdict}."


def comparison_sentence(run: Run) -> str:
    """One sentence: does mixture minus baseline exceed its interval? "" where there is nothing to compare."""
    result = compare(run)
    if result is None:
        return ""
    points, low, high = result.in_points()
    how = "paired" if result.paired else f"unpaired, since {result.note}"
    count = "" if result.num_examples is None else f" over {result.num_examples:,} test images"
    if math.isnan(result.low):
        return (
            f"Mixture minus baseline: {points} points of robust accuracy; without intervals in results.json "
            "nothing can be said about chance."
        )
    verdict = result.verdict(
        "the mixture is more robust than the baseline", "the mixture is less robust than the baseline"
    )
    return (
        f"Mixture minus baseline: {points} points of robust accuracy, 95 % interval [{low}, {high}] "
        f"({how}{count}): {verdict}, as far as the draw of test images goes "
        "(the training seed is not in the interval)."
    )
