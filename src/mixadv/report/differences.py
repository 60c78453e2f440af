"""Does it pay? Paired differences between the runs of a sweep, for each question that its settings can answer."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from mixadv.report.comparison import Comparison, compare_with_best_member, paired
from mixadv.report.files import Run, read_arrays, replacing
from mixadv.report.settings import SAMPLED, SHARED, UNIFORM, Setting, names_of, setting_of

CLEAN, PGD, APGD, ALL = "clean", "pgd-20", "apgd", "all points"
MEMBERS, GAP = "mean of the members", "matching-penny gap"
EQUAL_EPOCHS = "mixture or one model, equal epochs per model"
EQUAL_COMPUTING = "mixture or one model, equal computing"
LEARNED = "learned or equal weights"
SCHEDULES = "sampled or shared updates"
APART = "trained apart or as a mixture"
APART_SINGLE = "trained apart or one model"
BEST_MEMBER = "mixture or its best member"
CSV_HEADER = [
    "question",
    "first",
    "second",
    "seeds",
    "measure",
    "difference",
    "low",
    "high",
    "num_examples",
    "verdict",
]


class Difference(NamedTuple):
    """Accuracy of `first` minus that of `second`, for one `measure`.

    Attributes:
        question: which of the questions of this module it answers.
        first, second: names of the two settings.
        seeds: of the trainings compared; of several the per-image differences are averaged before the interval is
            made, which therefore covers the draw of test images, not that of seeds.
        measure: "clean"; "pgd-20", "apgd" (the lower of all APGD attacks on the mixture) or "all points" (found by
            anyone), robust accuracy under these; of a mixture against one model also the two parts of the last one,
            "mean of the members" (sum_k lambda_k of the members' robust accuracies, minus the one model's) and
            "matching-penny gap" (what the mixture has above this mean).
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
        """Which of the two is ahead, or that the interval does not resolve it."""
        low, high = self.comparison.low, self.comparison.high
        if self.measure == GAP:
            return "above 0" if low > 0 else "unresolved"
        return "first" if low > 0 else "second" if high < 0 else "unresolved"


def accuracies(run: Run) -> dict[str, np.ndarray]:
    """Per test image [N] float64: expected accuracy by measure, as far as the run's records have it.

    Raises:
        ValueError: there are no records, or they are not those of the results.
    """
    arrays = read_arrays(run.path / "records.npz")
    if arrays is None or not {"labels", "clean", "robust"} <= set(arrays):
        raise ValueError(f"{run.path / 'records.npz'} is missing, or has no labels, clean or robust")
    found = {CLEAN: arrays["clean"].astype(np.float64), ALL: arrays["robust"].astype(np.float64)}
    for measure, prefix in ((PGD, f"attack/{PGD}"), (APGD, "attack/apgd-")):
        of_family = [arrays[key] for key in arrays if key.startswith(prefix)]
        if of_family:
            # An attacker may leave an image as it is.
            found[measure] = np.min([found[CLEAN], *of_family], axis=0)
    members = arrays.get("members_robust")
    if members is not None and members.shape == (len(run.weights), len(found[ALL])):
        found[MEMBERS] = np.asarray(run.weights) @ members.astype(np.float64)
        found[GAP] = found[ALL] - found[MEMBERS]
    shapes = {values.shape for values in found.values()}
    # Stale records beside newer results would give an interval about other numbers than the table's.
    if shapes != {arrays["labels"].shape} or abs(found[ALL].mean() - (run.robust.value or 0.0)) > 1e-4:
        raise ValueError(f"{run.path / 'records.npz'} does not belong to its results.json")
    return found | {"labels": arrays["labels"]}


def compare_settings(runs: Sequence[Run]) -> tuple[list[Difference], list[str]]:
    """All answers that `runs` can give, and a line for each run whose records could not be used.

    Runs are compared that differ in what is asked and in nothing else, were measured on the same images, and have the
    same seed (a run that was only measured is compared with every seed).
    """
    groups: dict[Setting, dict[int, dict[str, np.ndarray]]] = defaultdict(dict)
    notes, singles = [], []
    for run in runs:
        if run.robust.value is None:
            continue
        try:
            found = accuracies(run)
        except ValueError as error:
            notes.append(str(error))
            continue
        groups[setting_of(run)][run.seed or 0] = found
        singles.append(run)
    settings = sorted(groups, key=lambda setting: setting.order)
    names = names_of(settings)
    answers: list[Difference] = []
    for question, first, second in _questions(settings):
        answers += _answer(question, names[first], names[second], groups[first], groups[second])
    answers += _best_members(singles, names)
    return answers, notes


def _questions(settings: Sequence[Setting]) -> Iterator[tuple[str, Setting, Setting]]:
    found = [(question, a, b) for a in settings for b in settings if (question := _question(a, b))]
    order = (EQUAL_EPOCHS, EQUAL_COMPUTING, LEARNED, SCHEDULES, APART, APART_SINGLE)
    yield from sorted(found, key=lambda one: order.index(one[0]))


def _question(a: Setting, b: Setting) -> str | None:
    """What the difference a - b answers, if anything."""
    if a.num_members < 2 or b.origin or a == b:
        return None
    if a.origin:
        return APART if a.num_members == b.num_members else APART_SINGLE if b.is_single else None
    if a.loss != b.loss or a.rest != b.rest:
        return None
    if b.is_single:
        if a.epochs == b.epochs:
            return EQUAL_EPOCHS
        # One shared attack for all members: L members cost what L models cost.
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
    question: str,
    first: str,
    second: str,
    a: Mapping[int, Mapping[str, np.ndarray]],
    b: Mapping[int, Mapping[str, np.ndarray]],
) -> list[Difference]:
    """For each seed, and for the mean of several, one difference per measure."""
    measured_once = question in (APART, APART_SINGLE) and len(a) == 1
    pairs = {seed: (next(iter(a.values())) if measured_once else a.get(seed), b[seed]) for seed in sorted(b)}
    each: dict[int, dict[str, np.ndarray]] = {}
    for seed, (x, y) in pairs.items():
        if x is None or not np.array_equal(x["labels"], y["labels"]):
            continue
        each[seed] = {m: x[m] - y[m] for m in (CLEAN, PGD, APGD, ALL) if m in x and m in y}
        if question in (EQUAL_EPOCHS, EQUAL_COMPUTING, APART_SINGLE) and MEMBERS in x:
            each[seed] |= {MEMBERS: x[MEMBERS] - y[ALL], GAP: x[GAP]}
    if not each:
        return []
    groups = [(seed,) for seed in each] + ([tuple(each)] if len(each) > 1 else [])
    measures = list(next(iter(each.values())))
    return [
        Difference(question, first, second, seeds, m, paired(np.mean([each[seed][m] for seed in seeds], axis=0)))
        for seeds in groups
        for m in measures
        if all(m in each[seed] for seed in seeds)
    ]


def _best_members(runs: Sequence[Run], names: Mapping[Setting, str]) -> list[Difference]:
    answers = []
    for run in sorted(runs, key=lambda run: (setting_of(run).order, run.seed or 0)):
        compared = compare_with_best_member(run)
        if compared is not None:
            name, seeds = names[setting_of(run)], (run.seed or 0,)
            answers.append(Difference(BEST_MEMBER, name, f"member {compared[0]}", seeds, ALL, compared[1]))
    return answers


def differences_table(answers: Sequence[Difference]) -> Table:
    """One row for each question and pair of settings, of several seeds their mean; points of accuracy."""
    table = Table(title="Differences in robust accuracy, points [95 % interval]", title_justify="left")
    caption = "Paired by test image. Intervals cover the draw of test images, not that of training seeds."
    table.caption, table.caption_justify = caption, "left"
    for heading in ("question", "first minus second", "seeds"):
        table.add_column(heading, overflow="fold")
    for heading in ("PGD-20", "all points", "ahead"):
        table.add_column(heading, no_wrap=True)
    rows: dict[tuple[str, str, str], dict[tuple[int, ...], dict[str, Difference]]] = defaultdict(dict)
    for answer in answers:
        rows[answer.question, answer.first, answer.second].setdefault(answer.seeds, {})[answer.measure] = answer
    last = ""
    for (question, first, second), by_seeds in rows.items():
        shown = by_seeds.values() if question == BEST_MEMBER else [by_seeds[max(by_seeds, key=len)]]
        for by_measure in shown:
            whole = by_measure[ALL]
            table.add_row(
                Text(question if question != last else ""),
                Text(f"{first} – {second}"),
                ", ".join(map(str, whole.seeds)),
                _points(by_measure.get(PGD)),
                _points(whole),
                whole.verdict,
            )
            last = question
    return table


def _points(answer: Difference | None) -> Text:
    if answer is None:
        return Text("–")
    points, low, high = answer.comparison.in_points()
    return Text(f"{points} [{low}, {high}]")


def write_differences_csv(answers: Sequence[Difference], path: str | Path) -> Path:
    """Every answer in full precision, fractions: one row per question, pair, seed (and their mean) and measure.

    Raises:
        UserError: `path` cannot be written.
    """
    path = Path(path)
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(CSV_HEADER)
        for answer in answers:
            c = answer.comparison
            seeds = " ".join(map(str, answer.seeds))
            row = [answer.question, answer.first, answer.second, seeds, answer.measure, c.difference, c.low, c.high]
            writer.writerow([*row, c.num_examples, answer.verdict])
    return path
