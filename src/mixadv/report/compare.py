"""Differences in accuracy between classifiers or runs on the same test images, with 95 % intervals.

For groups of runs that differ in the seed alone, `mean_accuracies` gives the accuracies of each run, and `differences`
compares two groups seed by seed and image by image.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from mixadv.intervals import ROUNDING, num_differing, paired_interval
from mixadv.report.attacks import TWIN, is_single
from mixadv.report.files import Run
from mixadv.report.records import ALL, APGD, CLEAN, CONSTANT, GAP, MEMBERS, PGD, VOTE, Measured, measured

MEASURES = (CLEAN, PGD, APGD, ALL, MEMBERS, GAP)


class Comparison(NamedTuple):
    """One accuracy minus another, with a 95 % interval.

    Attributes:
        difference, low, high: fractions.
        paired: whether it was computed image by image.
        num_examples: the number of test images; if unpaired, that of the first evaluation.
        num_differing: the number of images on which the two accuracies differ; None if unpaired.
        note: why it is not paired, else "".
    """

    difference: float
    low: float
    high: float
    paired: bool
    num_examples: int | None
    num_differing: int | None
    note: str

    def in_points(self) -> tuple[str, str, str]:
        """Difference and ends of the interval as signed percentage points; what rounds to 0 is +0.0."""
        # Adding 0 turns -0.0 into 0.0.
        points, low, high = (f"{round(100 * x, 1) + 0.0:+.1f}" for x in (self.difference, self.low, self.high))
        return points, low, high

    def in_words(self) -> str:
        """Difference and interval as part of a sentence."""
        points, low, high = self.in_points()
        return f"{points} points, 95 % interval [{low}, {high}]{self.counted}"

    @property
    def counted(self) -> str:
        """How many images differ, as part of a sentence; "" if that is unknown."""
        if self.num_differing is None:
            return ""
        return f" (paired: the two differ on {self.num_differing:,} of {self.num_examples:,} test images)"

    def verdict(self, higher: str, lower: str, neither: str = "no difference is shown") -> str:
        """`higher` or `lower` if the whole interval is on that side of 0, else `neither`."""
        if self.low > 0:
            return higher
        return lower if self.high < 0 else neither


def paired(differences: np.ndarray) -> Comparison:
    """The comparison of differences d [N] per image, see `paired_interval`."""
    low, mean, high = paired_interval(differences)
    return Comparison(mean, low, high, True, len(differences), num_differing(differences), "")


# --- of one run --------------------------------------------------------------------------------------------


def compare_with_baseline(run: Run) -> Comparison | None:
    """Mixture minus baseline; None without a baseline or without results of both.

    If both have per-image robust accuracies on the same test images, the interval is `paired_interval` of their
    differences. Otherwise it is the normal approximation for
    independent estimates, with half width sqrt(h_a^2 + h_b^2) from the half widths of the two intervals. That is
    wider, because it ignores that both were measured on the same images. Both intervals cover the draw of the test
    images, not the training seed.
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
    half_widths = [(ends[1] - ends[0]) / 2 for ends in (run.robust.ends, other.robust.ends) if ends]
    half = math.hypot(*half_widths) if len(half_widths) == 2 else math.nan
    return Comparison(difference, difference - half, difference + half, False, run.num_examples, None, note)


def compare_with_best_member(run: Run) -> tuple[int, str, Comparison] | None:
    """The best member: its index, on which images it was chosen, and the mixture minus it, paired.

    None if L < 2 or without usable records. Results without a choice on other images name the member with the highest
    robust accuracy on the test images, which favours it.
    """
    known = run.results.counterparts
    chosen = known.best_member if known is not None else None
    try:
        found = measured(run)
    except ValueError:
        return None
    if found.members is None or len(found.members) < 2:
        return None
    best, how = int(found.members.mean(axis=1).argmax()), "chosen on the same images, which favours it"
    if known is not None and chosen is not None and chosen.which in range(len(found.members)):
        best, how = int(chosen.which or 0), f"chosen on {known.chosen_on or 'unknown images'}"
    return best, how, paired(found.accuracies[ALL] - found.members[best])


def counterpart_sentences(run: Run) -> list[str]:
    """Mixture minus each deterministic counterpart, one sentence each; [] if there is nothing to compare."""
    sentences = []
    if (member := compare_with_best_member(run)) is not None:
        best, how, comparison = member
        sentences.append(_sentence(f"its best member (member {best}, {how})", "its best member alone", comparison))
    mine = "Model" if is_single(run) else "Mixture"
    for name, comparison in compare_with_counterparts(run).items():
        sentences.append(_sentence(WHO[name], WHO[name], comparison, mine))
    return sentences


def compare_with_counterparts(run: Run) -> dict[str, Comparison]:
    """Vote, averaged twin and constant answer -> the mixture minus it, paired; {} without usable records.

    A single model is its own vote and averaged twin, so it has the constant answer alone.
    """
    try:
        found = measured(run)
    except ValueError:
        return {}
    return {
        name: paired(found.accuracies[ALL] - right)
        for name, right in found.counterparts.items()
        if name == CONSTANT or not is_single(run)
    }


# Counterpart -> its name in a sentence.
WHO = {VOTE: "the vote of its members", TWIN: "its averaged twin", CONSTANT: "the best constant answer"}


def _sentence(other: str, short: str, result: Comparison, mine: str = "Mixture") -> str:
    ahead = f"{short} is ahead, but no difference is shown" if result.difference < -ROUNDING else ""
    verdict = result.verdict(
        f"the {mine.lower()} is more robust",
        f"{short} is more robust than the {mine.lower()}",
        *([ahead] if ahead else []),
    )
    return f"{mine} minus {other}: {result.in_words()}: {verdict}."


def baseline_sentence(run: Run) -> str:
    """One sentence: mixture minus baseline; "" if there is nothing to compare."""
    result = compare_with_baseline(run)
    if result is None:
        return ""
    points, low, high = result.in_points()
    count = "" if result.num_examples is None else f" over {result.num_examples:,} test images"
    how = result.counted or f" (unpaired, since {result.note}{count})"
    if math.isnan(result.low):
        return (
            f"Mixture minus baseline: {points} points of robust accuracy; without intervals in results.json "
            "the uncertainty is unknown."
        )
    verdict = result.verdict(
        "the mixture is more robust than the baseline", "the mixture is less robust than the baseline"
    )
    return (
        f"Mixture minus baseline: {points} points of robust accuracy, 95 % interval [{low}, {high}]{how}: {verdict}. "
        "The interval covers the draw of the test images, not the training seed."
    )


# --- of many runs ------------------------------------------------------------------------------------------


def measured_by_seed(runs: Iterable[Run], notes: list[str]) -> dict[int, Measured]:
    """Seed -> records, for the runs of one setting; each unusable run adds a line to `notes`."""
    by_seed: dict[int, Measured] = {}
    for run in runs:
        if run.robust.value is None:
            continue
        try:
            found = measured(run)
        except ValueError as error:
            notes.append(str(error))
            continue
        # Baselines of several runs are repetitions with equal numbers: no reason for a note.
        known = by_seed.setdefault(run.seed or 0, found)
        if not np.array_equal(known.accuracies[ALL], found.accuracies[ALL]):
            notes.append(f"{run.path} repeats setting and seed of another run")
    return by_seed


def mean_accuracies(runs: Iterable[Run]) -> dict[str, list[float]]:
    """Measure -> one mean for each run with results. Runs without usable records have only clean and all points."""
    means: dict[str, list[float]] = {}
    for run in runs:
        if run.robust.value is None or run.clean.value is None:
            continue
        try:
            found = {measure: float(each.mean()) for measure, each in measured(run).accuracies.items()}
        except ValueError:
            found = {CLEAN: run.clean.value, ALL: run.robust.value}
        for measure, mean in found.items():
            means.setdefault(measure, []).append(mean)
    return means


class Difference(NamedTuple):
    """Accuracy of one setting minus that of another, for one `measure`.

    Attributes:
        seeds: of the compared trainings. For several seeds the interval is that of the per-image differences averaged
            over seeds: it covers the draw of test images, not of seeds.
        measure: see `Measured`. The difference of a mixture from a single model at all points has two parts: "mean of
            the members" (minus the single model) and "matching-penny gap".
        comparison: the difference with its 95 % interval.
    """

    seeds: tuple[int, ...]
    measure: str
    comparison: Comparison

    @property
    def verdict(self) -> str:
        """ "first", "second", or "unresolved" if the interval contains 0; "" for a part of a difference."""
        return "" if self.measure in (MEMBERS, GAP) else self.comparison.verdict("first", "second", "unresolved")


def differences(
    first: Mapping[int, Measured], second: Mapping[int, Measured], *, parts: bool = False
) -> tuple[list[Difference], list[int]]:
    """`first` minus `second` for each common seed, and for the mean over seeds if there are several.

    Args:
        first, second: seed -> records of one setting.
        parts: add the two parts of the difference at all points; `first` are mixtures, `second` single models.

    Returns:
        One difference per measure and group of seeds; and the seeds that were left out because their runs have other
        images or attacks.
    """
    each: dict[int, dict[str, np.ndarray]] = {}
    like: Measured | None = None
    refused = []
    for seed in sorted(first.keys() & second.keys()):
        x, y = first[seed], second[seed]
        if not x.comparable(y) or (like is not None and not like.comparable(y)):
            refused.append(seed)
            continue
        like = y
        shared = [m for m in (CLEAN, PGD, APGD, ALL) if m in x.accuracies and m in y.accuracies]
        each[seed] = {m: x.accuracies[m] - y.accuracies[m] for m in shared}
        if parts and MEMBERS in x.accuracies:
            each[seed] |= {MEMBERS: x.accuracies[MEMBERS] - y.accuracies[ALL], GAP: x.accuracies[GAP]}
    groups = [(seed,) for seed in each] + ([tuple(each)] if len(each) > 1 else [])
    found = [
        Difference(seeds, measure, paired(np.mean([each[seed][measure] for seed in seeds], axis=0)))
        for seeds in groups
        for measure in MEASURES
        if all(measure in each[seed] for seed in seeds)
    ]
    return found, refused
