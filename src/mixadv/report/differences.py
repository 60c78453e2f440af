"""Does it pay? Paired differences between the runs of a sweep, for each question that its settings can answer."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table

from mixadv.report.cells import NONE, add_row, new_table, write_csv
from mixadv.report.comparison import Comparison, compare_with_best_member, paired
from mixadv.report.files import Run
from mixadv.report.records import ALL, APGD, CLEAN, GAP, MEMBERS, PGD, Measured, measured
from mixadv.report.settings import SAMPLED, SHARED, UNIFORM, Setting, grouped, names_of

EQUAL_EPOCHS = "mixture or one model, equal epochs per model"
EQUAL_COMPUTING = "mixture or one model of L times the epochs"
LEARNED = "learned or equal weights"
SCHEDULES = "sampled or shared updates"
MEASURED = "only measured, or trained as a mixture"
MEASURED_SINGLE = "only measured, or one model"
BEST_MEMBER = "mixture or its best member"
QUESTIONS = (EQUAL_EPOCHS, EQUAL_COMPUTING, LEARNED, SCHEDULES, MEASURED, MEASURED_SINGLE, BEST_MEMBER)
CSV_HEADER = (
    *("question", "first", "second", "seeds", "measure"),
    *("difference", "low", "high", "num_examples", "verdict"),
)


class Difference(NamedTuple):
    """Accuracy of `first` minus that of `second`, for one `measure`.

    Attributes:
        question: which of the questions of this module it answers.
        first, second: names of the two settings.
        seeds: of the trainings compared; of several the per-image differences are averaged before the interval is
            made, which therefore covers the draw of test images, not that of seeds.
        measure: see `Measured`; of a mixture against one model also the two parts of the difference at all points, the
            "mean of the members" (minus the one model's) and the "matching-penny gap".
        comparison: the difference with its 95 % interval.
    """

    question: str
    first: str
    second: str
    seeds: tuple[int, ...]
    measure: str
    comparison: Comparison

    @property
    def verdict(self) -> str:
        """Which of the two is ahead, or that the interval does not resolve it; "" for a part of a difference."""
        if self.measure in (MEMBERS, GAP):
            return ""
        return "first" if self.comparison.low > 0 else "second" if self.comparison.high < 0 else "unresolved"


def compare_settings(runs: Sequence[Run]) -> tuple[list[Difference], list[str]]:
    """All answers that `runs` and their baselines can give, and a line for whatever could not be used.

    Runs are compared that differ in what is asked and in nothing else, were measured by the same attacks on the same
    images, and have the same seed (a run that was only measured is compared with every seed).
    """
    groups: dict[Setting, dict[int, Measured]] = {}
    notes = []
    answers: list[Difference] = []
    every = grouped([run for run in runs if run.robust.value is not None])
    names = names_of(list(every))
    for setting, repetitions in every.items():
        groups[setting] = {}
        for run in repetitions:
            if run.robust.value is None:
                continue
            try:
                found = measured(run)
            except ValueError as error:
                notes.append(str(error))
                continue
            seed = run.seed or 0
            if seed in groups[setting]:
                # The baselines of several runs are the same training.
                if not np.array_equal(groups[setting][seed].accuracies[ALL], found.accuracies[ALL]):
                    notes.append(f"{run.path} repeats setting and seed of another run")
                continue
            groups[setting][seed] = found
            compared = compare_with_best_member(run)
            if compared is not None:
                best = f"member {compared[0]}"
                answers.append(Difference(BEST_MEMBER, names[setting], best, (seed,), ALL, compared[1]))
    for a, b in itertools.product(groups, groups):
        if (question := _question(a, b)) is not None:
            answers += _answer(question, names[a], names[b], groups[a], groups[b], notes)
    return sorted(answers, key=lambda answer: QUESTIONS.index(answer.question)), notes


def _question(a: Setting, b: Setting) -> str | None:
    """What the difference a - b answers, if anything."""
    if a.num_members < 2 or b.origin or a == b:
        return None
    if a.origin:
        return MEASURED if a.num_members == b.num_members else MEASURED_SINGLE if b.is_single else None
    if a.loss != b.loss or a.rest != b.rest:
        return None
    if b.is_single:
        if a.epochs == b.epochs:
            return EQUAL_EPOCHS
        # One shared attack for all members: L members cost what L models cost, the weights phases aside.
        shared = a.schedule == SHARED and a.epochs is not None
        return EQUAL_COMPUTING if shared and b.epochs == a.num_members * (a.epochs or 0) else None
    if (a.num_members, a.epochs) != (b.num_members, b.epochs):
        return None
    if a.solver != UNIFORM and b.solver == UNIFORM and a.schedule == b.schedule:
        return LEARNED
    if (a.solver, a.weighing) == (b.solver, b.weighing) and (a.schedule, b.schedule) == (SAMPLED, SHARED):
        return SCHEDULES
    return None


def _answer(
    question: str, first: str, second: str, a: Mapping[int, Measured], b: Mapping[int, Measured], notes: list[str]
) -> list[Difference]:
    """For each seed, and for the mean of several, one difference per measure."""
    once = next(iter(a.values())) if question in (MEASURED, MEASURED_SINGLE) and len(a) == 1 else None
    each: dict[int, dict[str, np.ndarray]] = {}
    like: Measured | None = None
    for seed, y in sorted(b.items()):
        x = once or a.get(seed)
        if x is None:
            continue
        if not x.comparable(y) or (like is not None and not like.comparable(y)):
            notes.append(f"{first} and {second}, seed {seed}: measured on other images or by other attacks")
            continue
        like = y
        of_both = [m for m in (CLEAN, PGD, APGD, ALL) if m in x.accuracies and m in y.accuracies]
        each[seed] = {m: x.accuracies[m] - y.accuracies[m] for m in of_both}
        if question in (EQUAL_EPOCHS, EQUAL_COMPUTING, MEASURED_SINGLE) and MEMBERS in x.accuracies:
            each[seed] |= {MEMBERS: x.accuracies[MEMBERS] - y.accuracies[ALL], GAP: x.accuracies[GAP]}
    groups = [(seed,) for seed in each] + ([tuple(each)] if len(each) > 1 else [])
    return [
        Difference(question, first, second, seeds, m, paired(np.mean([each[seed][m] for seed in seeds], axis=0)))
        for seeds in groups
        for m in (CLEAN, PGD, APGD, ALL, MEMBERS, GAP)
        if all(m in each[seed] for seed in seeds)
    ]


def differences_table(answers: Sequence[Difference]) -> Table:
    """One row for each question and pair of settings, of several seeds their mean; points of accuracy."""
    headings = ("question", "first minus second", "seeds", "PGD-20", "all points", "members + gap", "ahead")
    table = new_table(
        "Differences in robust accuracy, points [95 % interval]",
        headings,
        words=headings,
        folds={"question": 14, "first minus second": 18, "seeds": 5},
        caption="Paired by test image. Intervals cover the draw of test images, not that of training seeds.\n"
        "All points = members + gap: the members' weighted mean against the one model, and the matching-penny gap.",
    )
    rows: dict[tuple[str, str, str], dict[tuple[int, ...], dict[str, Difference]]] = defaultdict(dict)
    for answer in answers:
        rows[answer.question, answer.first, answer.second].setdefault(answer.seeds, {})[answer.measure] = answer
    last = ""
    for (question, first, second), by_seeds in rows.items():
        shown = by_seeds.values() if question == BEST_MEMBER else [by_seeds[max(by_seeds, key=len)]]
        for found in shown:
            parts = [found[measure].comparison.in_points()[0] for measure in (MEMBERS, GAP) if measure in found]
            asked, pair = question if question != last else "", f"{first} – {second}"
            points = [_points(found.get(PGD)), _points(found[ALL]), " ".join(parts)]
            add_row(table, [asked, pair, ", ".join(map(str, found[ALL].seeds)), *points, found[ALL].verdict])
            last = question
    return table


def _points(answer: Difference | None) -> str:
    if answer is None:
        return NONE
    points, low, high = answer.comparison.in_points()
    return f"{points} [{low}, {high}]"


def write_differences_csv(answers: Sequence[Difference], path: str | Path) -> Path:
    """Every answer in full precision, fractions: one row per question, pair, seed (and their mean) and measure.

    Raises:
        UserError: `path` cannot be written.
    """
    rows = [
        {
            **answer._asdict(),
            **answer.comparison._asdict(),
            "seeds": " ".join(map(str, answer.seeds)),
            "verdict": answer.verdict,
        }
        for answer in answers
    ]
    return write_csv(path, CSV_HEADER, [{key: row[key] for key in CSV_HEADER} for row in rows])
