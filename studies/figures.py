#!/usr/bin/env python3
"""Tables and figures of a study: do mixtures pay? All its runs have the same eps.

    python studies/figures.py results/small

prints the differences between the settings and writes into that folder `differences.csv`, `accuracy.png` (test accuracy
against L under several attacks), `training.png` (validation accuracy under attack against epochs), `weights.png`
(lambda during training) and `cost.png`. `python run.py task=report runs=results/small` writes report.csv and report.png
into the same folder.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.console import Console
from settings import SAMPLED, SHARED, UNIFORM, Groups, Setting, grouped

from mixadv.report import find_runs
from mixadv.report.cells import NONE, Column, Table, on_console, print_whole, write_csv
from mixadv.report.compare import (
    Difference,
    compare_with_best_member,
    differences,
    mean_accuracies,
    measured_by_seed,
)
from mixadv.report.figures.curves import column, weight_of
from mixadv.report.figures.style import (
    DASHES,
    LINE_COLOURS,
    MARKERS,
    footnote,
    member_style,
    new_figure,
    save,
)
from mixadv.report.files import Run
from mixadv.report.names import format_ball
from mixadv.report.records import ALL, APGD, CLEAN, GAP, MEMBERS, PGD

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# --- differences -------------------------------------------------------------------------------------------

EQUAL_EPOCHS = "mixture or one model, equal epochs per model"
EQUAL_COMPUTING = "mixture or one model of L times the epochs"
LEARNED = "learned or equal weights"
SCHEDULES = "sampled or shared updates"
MEASURED = "only measured, or trained as a mixture"
MEASURED_SINGLE = "only measured, or one model"
BEST_MEMBER = "mixture or its best member"
QUESTIONS = (EQUAL_EPOCHS, EQUAL_COMPUTING, LEARNED, SCHEDULES, MEASURED, MEASURED_SINGLE, BEST_MEMBER)


class Answer(NamedTuple):
    """A difference that answers a question: `first` minus `second`, the names of two settings."""

    question: str
    first: str
    second: str
    difference: Difference


def answers_of(runs: Sequence[Run]) -> tuple[list[Answer], list[str]]:
    """All answers from `runs` and their baselines, and one line for each run that cannot be used.

    Two runs are compared if they differ only in the setting of the question, have the same seed, and were measured by
    the same attacks on the same images. A run that was only measured is compared with every seed.
    """
    groups = grouped([run for run in runs if run.robust.value is not None])
    names = names_of(list(groups))
    answers: list[Answer] = []
    notes: list[str] = []
    for setting, of_setting in groups.items():
        seeds = set()
        for run in of_setting:
            seed = run.seed or 0
            if seed not in seeds and (found := compare_with_best_member(run)) is not None:
                best, _, comparison = found
                answers.append(
                    Answer(BEST_MEMBER, names[setting], f"member {best}", Difference((seed,), ALL, comparison))
                )
            seeds.add(seed)
    by_seed = {setting: measured_by_seed(of_setting, notes) for setting, of_setting in groups.items()}
    for a, b in itertools.product(groups, groups):
        if (question := _question(a, b)) is None:
            continue
        first, second = by_seed[a], by_seed[b]
        if question in (MEASURED, MEASURED_SINGLE) and len(first) == 1:
            first = dict.fromkeys(second, next(iter(first.values())))
        parts = question in (EQUAL_EPOCHS, EQUAL_COMPUTING, MEASURED_SINGLE)
        found, refused = differences(first, second, parts=parts)
        answers += [Answer(question, names[a], names[b], one) for one in found]
        notes += [
            f"{names[a]} and {names[b]}, seed {seed}: measured on other images or by other attacks" for seed in refused
        ]
    return sorted(answers, key=lambda answer: QUESTIONS.index(answer.question)), notes


def _question(a: Setting, b: Setting) -> str | None:
    """The question that the difference a - b answers, if any."""
    if a.num_members < 2 or b.origin or a == b:
        return None
    if a.origin:
        return MEASURED if a.num_members == b.num_members else MEASURED_SINGLE if b.is_single else None
    if a.loss != b.loss or a.rest != b.rest:
        return None
    if b.is_single:
        if a.epochs == b.epochs:
            return EQUAL_EPOCHS
        # With one shared attack, L members cost as much as L models, apart from the weights phases.
        shared = a.schedule == SHARED and a.epochs is not None
        return EQUAL_COMPUTING if shared and b.epochs == a.num_members * (a.epochs or 0) else None
    if (a.num_members, a.epochs) != (b.num_members, b.epochs):
        return None
    if a.solver != UNIFORM and b.solver == UNIFORM and a.schedule == b.schedule:
        return LEARNED
    if (a.solver, a.weighing) == (b.solver, b.weighing) and (a.schedule, b.schedule) == (SAMPLED, SHARED):
        return SCHEDULES
    return None


ANSWERS: tuple[Column[Answer], ...] = (
    Column("question", "question", lambda a: a.question),
    Column("first", "first", lambda a: a.first),
    Column("second", "second", lambda a: a.second),
    Column("seeds", "seeds", lambda a: " ".join(map(str, a.difference.seeds))),
    Column("measure", "measure", lambda a: a.difference.measure),
    Column("difference", "difference", lambda a: a.difference.comparison.difference),
    Column("low", "low", lambda a: a.difference.comparison.low),
    Column("high", "high", lambda a: a.difference.comparison.high),
    Column("num_examples", "images", lambda a: a.difference.comparison.num_examples),
    Column("num_differing", "differing", lambda a: a.difference.comparison.num_differing),
    Column("verdict", "verdict", lambda a: a.difference.verdict),
)


def write_answers(answers: Sequence[Answer], path: str | Path) -> Path:
    """Write fractions in full precision: one row per question, pair, seed (or their mean) and measure."""
    return write_csv(path, Table("", ANSWERS, answers))


class Pair(NamedTuple):
    """All measures for one question, pair of settings and group of seeds."""

    question: str
    first: str
    second: str
    seeds: tuple[int, ...]
    found: dict[str, Difference]

    def points(self, measure: str) -> str:
        """A difference in percentage points with its interval, and the number of images that differ."""
        if measure not in self.found:
            return NONE
        comparison = self.found[measure].comparison
        points, low, high = comparison.in_points()
        return f"{points} [{low}, {high}] {comparison.num_differing}"

    @property
    def parts(self) -> str:
        """The two parts of the difference at all points."""
        known = [self.found[measure] for measure in (MEMBERS, GAP) if measure in self.found]
        return " ".join(one.comparison.in_points()[0] for one in known)


def answers_table(answers: Sequence[Answer]) -> Table[Pair]:
    """One row for each question and pair of settings, in percentage points; several seeds are averaged."""
    rows: dict[tuple[str, str, str], dict[tuple[int, ...], dict[str, Difference]]] = defaultdict(dict)
    for question, first, second, one in answers:
        rows[question, first, second].setdefault(one.seeds, {})[one.measure] = one
    pairs = []
    for names, by_seeds in rows.items():
        shown = by_seeds if names[0] == BEST_MEMBER else [max(by_seeds, key=len)]
        pairs += [Pair(*names, seeds, by_seeds[seeds]) for seeds in shown]
    columns: list[Column[Pair]] = [
        Column("question", "question", lambda pair: pair.question, words=True, fold=14),
        Column("pair", "first minus second", lambda pair: f"{pair.first} – {pair.second}", words=True, fold=18),
        Column("seeds", "seeds", lambda pair: ", ".join(map(str, pair.seeds)), words=True, fold=5),
        Column("pgd_20", "PGD-20", lambda pair: pair.points(PGD), words=True),
        Column("robust", "all points", lambda pair: pair.points(ALL), words=True),
        Column("parts", "members + gap", lambda pair: pair.parts, words=True),
        Column("ahead", "ahead", lambda pair: pair.found[ALL].verdict, words=True),
    ]
    return Table(
        "Differences in robust accuracy, points [95 % interval] images that differ",
        columns,
        pairs,
        caption="Paired by test image. Intervals cover the draw of test images, not of training seeds.\n"
        "All points = members + gap: the members' weighted mean minus the one model, and the matching-penny gap.",
    )


# --- figures -----------------------------------------------------------------------------------------------

_KINDS = ("one model", "learned weights", "equal weights", "sampled updates")
Points = tuple[np.ndarray, np.ndarray]
TITLES = {
    CLEAN: "Clean test accuracy",
    PGD: "Robust: PGD-20",
    APGD: "Robust: APGD on the mixture",
    ALL: "Robust: all points found",
}


def study_figures(runs: Sequence[Run]) -> dict[str, Callable[[], Figure]]:
    """File name -> function that builds its figure, for the figures with data."""
    groups = grouped(runs)
    figures: dict[str, tuple[Any, Any]] = {
        "accuracy.png": (accuracy_figure, accuracies_on_test(groups)),
        "training.png": (training_figure, validation_curves(groups)),
        "weights.png": (weights_figure, learned_weights(groups)),
        "cost.png": (cost_figure, timed_runs(groups)),
    }
    return {name: partial(build, groups, shown) for name, (build, shown) in figures.items() if shown}


def usual_epochs(settings: Sequence[Setting]) -> float | None:
    """The most frequent number of epochs of the trained settings; the first one of equally frequent numbers."""
    lengths = Counter(setting.epochs for setting in settings if not setting.origin)
    return lengths.most_common(1)[0][0] if lengths else None


def names_of(settings: Sequence[Setting], with_size: bool = True) -> dict[Setting, str]:
    """The shortest name for each setting that distinguishes it from the others.

    Without `with_size`, mixtures that differ only in L have the same name.
    """
    trained = [setting for setting in settings if not setting.origin]
    usual = usual_epochs(settings)
    losses, schedules = {s.loss for s in trained}, {s.schedule for s in trained if s.schedule}
    # Losses and solvers have different keys: a key is in the names if it differs within one loss or solver.
    varied = set()
    for loss in losses:
        varied |= {key for key, _ in _differing([s.rest for s in trained if s.loss == loss])}
    for solver in {s.solver for s in trained}:
        varied |= {key for key, _ in _differing([s.weighing for s in trained if s.solver == solver])}
    names = {}
    for s in settings:
        size = f"L = {s.num_members}" if with_size else "one model" if s.is_single else ""
        parts = [s.loss if len(losses) > 1 else "", size, s.solver]
        parts.append(s.schedule if len(schedules) > 1 and s.schedule == SAMPLED else "")
        parts.append(f"{s.epochs:g} epochs" if s.epochs is not None and s.epochs != usual else "")
        parts += [f"{key}={value}" for key, value in sorted(s.weighing | s.rest) if key in varied]
        names[s] = s.origin or ", ".join(part for part in parts if part) or s.loss
    return names


def _differing(sets: Sequence[frozenset[tuple[str, str]]]) -> set[tuple[str, str]]:
    return set().union(*sets) - set(sets[0]).intersection(*sets[1:]) if sets else set()


def headline(groups: Groups) -> str:
    """Data, norm and eps of all runs."""
    runs = [run for of_setting in groups.values() for run in of_setting]
    data = sorted({run.data for run in runs if run.data})
    balls = sorted({format_ball(run.norm, run.eps) for run in runs if run.eps is not None})
    return " · ".join([", ".join(data), *balls])


def accuracies_on_test(groups: Groups) -> dict[Setting, dict[str, list[float]]]:
    """Setting and measure -> one number per run with results."""
    every = {setting: mean_accuracies(runs) for setting, runs in groups.items()}
    return {setting: means for setting, means in every.items() if means}


def accuracy_figure(groups: Groups, values: Mapping[Setting, Mapping[str, list[float]]]) -> Figure:
    """Clean accuracy, and robust accuracy under PGD-20, under APGD and at all points found, against L.

    Lines are means over seeds, bands their minimum to maximum. The axes are labelled with the measures.
    """
    measures = [m for m in TITLES if any(m in v for v in values.values())]
    settings = list(values)
    # The settings of a line differ only in L.
    labels = names_of(settings, with_size=False)
    rows = math.ceil(len(set(labels.values())) / 3)
    height = 5.2 + 0.3 * rows
    figure = new_figure(height, headline(groups))
    below = (1.45 + 0.3 * rows) / height
    figure.subplots_adjust(left=0.055, right=0.985, bottom=below, top=1 - 0.8 / height, wspace=0.16)
    robust: Any = None
    sizes = sorted({s.num_members for s in settings})
    for i, measure in enumerate(measures):
        shared = {} if measure == CLEAN else {"sharey": robust}
        axes = figure.add_subplot(1, len(measures), i + 1, label=measure, **shared)
        if measure != CLEAN:
            axes.tick_params(axis="y", labelleft=robust is None)
            robust = robust or axes
        axes.set_title(TITLES[measure], fontsize=13)
        axes.set_xlabel("L (number of members)")
        _accuracy_panel(axes, settings, labels, {s: v[measure] for s, v in values.items() if measure in v})
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.set_xlim(min(sizes) - 0.4, max(sizes) + 0.4)
        axes.grid(visible=False, axis="x")
    first = figure.axes[0]
    first.set_ylabel("accuracy")
    handles, names = first.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, below - 0.62 / height), ncols=3)
    notes = ["means over seeds, bands from their minimum to their maximum; dashed: one model that was trained longer"]
    total = sum(map(len, groups.values()))
    if missing := total - sum(len(of_setting[CLEAN]) for of_setting in values.values()):
        notes.append(f"{missing} of {total} runs have no results and are not shown")
    footnote(figure, "; ".join(notes))
    return figure


def _accuracy_panel(
    axes: Axes, settings: Sequence[Setting], labels: Mapping[Setting, str], values: Mapping[Setting, Sequence[float]]
) -> None:
    lines: dict[str, list[Setting]] = {label: [] for label in labels.values()}
    for setting in settings:
        if setting in values:
            lines[labels[setting]].append(setting)
    mixtures = [s for s in settings if not s.is_single and not s.origin]
    for i, (label, line) in enumerate(lines.items()):
        if not line:
            continue
        colour, marker = LINE_COLOURS[i % len(LINE_COLOURS)], MARKERS[i % len(MARKERS)]
        # Points of different lines at the same L stand side by side.
        aside = 0.44 * ((i + 0.5) / len(lines) - 0.5)
        at = [s.num_members + aside for s in line]
        means = [float(np.mean(values[s])) for s in line]
        low, high = [min(values[s]) for s in line], [max(values[s]) for s in line]
        axes.vlines(at, low, high, color=colour, alpha=0.45, linewidth=4)
        axes.plot(at, means, linestyle="", marker=marker, markersize=8, color=colour, label=label, zorder=3)
        if line[0].is_single:
            if mixtures and all(s.epochs != line[0].epochs for s in mixtures):
                axes.axhline(means[0], color=colour, linestyle=DASHES[1], linewidth=1.3)
        elif not line[0].origin:
            # The line starts at the single model with the same number of epochs, if there is one.
            start = next((s for s in values if s.is_single and _same_training(s, line[0])), None)
            if start is not None:
                at, means = [1 + aside, *at], [float(np.mean(values[start])), *means]
                low, high = [min(values[start]), *low], [max(values[start]), *high]
            axes.plot(at, means, color=colour, linewidth=1.5)
            axes.fill_between(at, low, high, color=colour, alpha=0.1, linewidth=0)


def _same_training(single: Setting, mixture: Setting) -> bool:
    return (single.loss, single.epochs, single.rest) == (mixture.loss, mixture.epochs, mixture.rest)


def validation_curves(groups: Groups) -> dict[Setting, list[Points]]:
    """Setting -> epochs [n] and validation accuracies under attack [n] of each run that has them."""
    curves: dict[Setting, list[Points]] = defaultdict(list)
    for setting, runs in groups.items():
        for run in runs:
            epochs, values = column(run, "val/robust_accuracy")
            if len(epochs) and not setting.origin:
                curves[setting].append((epochs, values))
    return curves


def training_figure(groups: Groups, curves: Mapping[Setting, Sequence[Points]]) -> Figure:
    """Validation accuracy under attack against epochs, one panel for each loss, whose axes have its name."""
    usual = usual_epochs(list(curves))
    shown = [s for s in curves if s.epochs == usual]
    names = names_of(shown)
    losses = sorted({s.loss for s in shown})
    figure = new_figure(6.2, headline(groups))
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.3, top=0.86, wspace=0.08)
    first: Any = None
    sizes = sorted({s.num_members for s in shown})
    for i, loss in enumerate(losses):
        axes = figure.add_subplot(1, len(losses), i + 1, label=loss, sharey=first)
        first = first or axes
        with_size: Counter[int] = Counter()
        for setting in (s for s in shown if s.loss == loss):
            x, y = _by_seed(curves[setting])
            # Settings with the same L have the same colour and different dashes.
            kind = with_size[setting.num_members]
            with_size[setting.num_members] += 1
            look: dict[str, Any] = {"color": LINE_COLOURS[sizes.index(setting.num_members) % len(LINE_COLOURS)]}
            label = names[setting].removeprefix(f"{loss}, ") + (f" ({len(y)} seeds)" if len(y) > 1 else "")
            dash, marker = DASHES[kind % len(DASHES)], MARKERS[kind % len(MARKERS)] if len(x) <= 30 else ""
            axes.plot(x, np.nanmean(y, axis=0), linestyle=dash, marker=marker, markersize=5, label=label, **look)
            if len(y) > 1:
                axes.fill_between(x, np.nanmin(y, axis=0), np.nanmax(y, axis=0), alpha=0.13, linewidth=0, **look)
        axes.set_title(loss)
        axes.tick_params(axis="y", labelleft=i == 0)
        axes.set(xlabel="epochs per model", xlim=(0, None))
        handles, labels = axes.get_legend_handles_labels()
        box = axes.get_position()
        place = ((box.x0 + box.x1) / 2, 0.195)
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=place, ncols=2 if len(losses) > 1 else 4)
    first.set_ylabel("validation accuracy under attack")
    notes = "lines: mean over seeds, bands: minimum to maximum"
    others = sorted({f"{s.epochs:g}" for s in curves if s.epochs != usual and s.epochs is not None})
    footnote(figure, notes + (f"; trainings of {' and '.join(others)} epochs are not shown" if others else ""))
    return figure


def _entry(label: str, **look: Any) -> Artist:
    """A legend entry without a line in the axes."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **look)


def _by_seed(curves: Sequence[Points]) -> tuple[np.ndarray, np.ndarray]:
    """All epochs [n] of the curves, and their values [seeds, n], nan where a run has none."""
    rounded = [dict(zip(np.round(x, 6).tolist(), y.tolist(), strict=True)) for x, y in curves]
    epochs = sorted(set().union(*rounded))
    return np.array(epochs), np.array([[of_seed.get(at, math.nan) for at in epochs] for of_seed in rounded])


def learned_weights(groups: Groups) -> dict[Setting, list[Run]]:
    """Setting -> its runs with learned lambda in their history."""
    learned = {
        setting: [run for run in runs if len(column(run, "lambda/0")[0])]
        for setting, runs in groups.items()
        if setting.num_members > 1 and not setting.origin and setting.solver != UNIFORM
    }
    return {setting: runs for setting, runs in learned.items() if runs}


def weights_figure(groups: Groups, learned: Groups) -> Figure:
    """Lambda during training, one panel for each setting."""
    names = names_of(list(learned))
    columns = min(3, len(learned))
    rows = math.ceil(len(learned) / columns)
    height = 1.6 + 3.4 * rows
    figure = new_figure(height, headline(groups))
    top, bottom = 1 - 0.95 / height, 1.3 / height
    figure.subplots_adjust(left=0.055, right=0.985, bottom=bottom, top=top, wspace=0.1, hspace=0.42)
    seeds = sorted({run.seed or 0 for runs in learned.values() for run in runs})
    most = max(_lambdas(run) for runs in learned.values() for run in runs)
    first: Any = None
    for i, (setting, runs) in enumerate(learned.items()):
        first = axes = figure.add_subplot(rows, columns, i + 1, label=names[setting], sharey=first)
        for run in runs:
            dash = DASHES[seeds.index(run.seed or 0) % len(DASHES)]
            for k in range(_lambdas(run)):
                colour = member_style(k)["color"]
                axes.plot(*weight_of(run, k), drawstyle="steps-post", color=colour, linestyle=dash)
        axes.axhline(1 / setting.num_members, color="#555555", linestyle=":", linewidth=1.5)
        axes.set(title=names[setting] or setting.loss, xlim=(0, None))
        axes.tick_params(axis="y", labelleft=i % columns == 0)
        if i % columns == 0:
            axes.set_ylabel("weight λ")
        if i >= len(learned) - columns:
            axes.set_xlabel("epochs per model")
    handles = [_entry(f"member {k}", color=member_style(k)["color"]) for k in range(most)]
    dashes = (DASHES[i % len(DASHES)] for i in range(len(seeds)))
    handles += [_entry(f"seed {s}", color="#222222", linestyle=dash) for s, dash in zip(seeds, dashes, strict=True)]
    handles.append(_entry("1/L", color="#555555", linestyle=":"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.1 / height), ncols=len(handles))
    return figure


def _lambdas(run: Run) -> int:
    """The number of weights in the history."""
    return sum(name.startswith("lambda/") for name in run.history)


def timed_runs(groups: Groups) -> dict[Setting, list[tuple[float, Run]]]:
    """Setting -> (seconds, run) of its finished trainings."""
    timed: dict[Setting, list[tuple[float, Run]]] = defaultdict(list)
    for setting, runs in groups.items():
        for run in runs:
            if not setting.origin and run.state == "done" and (seconds := run.training_seconds) is not None:
                timed[setting].append((seconds, run))
    return timed


def cost_figure(groups: Groups, timed: Mapping[Setting, Sequence[tuple[float, Run]]]) -> Figure:
    """Seconds of training per member, and robust accuracy against the seconds of the whole training.

    Its axes are labelled "cost" and "return".
    """
    names = names_of(list(timed))
    height = max(5.5, 1.9 + 0.36 * len(timed))
    figure = new_figure(height, headline(groups))
    figure.subplots_adjust(left=0.2, right=0.985, bottom=1.1 / height, top=1 - 0.95 / height, wspace=0.13)
    cost, pays = figure.add_subplot(1, 2, 1, label="cost"), figure.add_subplot(1, 2, 2, label="return")
    sizes = sorted({s.num_members for s in timed})
    for i, (setting, found) in enumerate(timed.items()):
        look: dict[str, Any] = {"color": LINE_COLOURS[sizes.index(setting.num_members) % len(LINE_COLOURS)]}
        each = [seconds / setting.num_members for seconds, _ in found]
        cost.barh(i, float(np.mean(each)), height=0.62, alpha=0.55, **look)
        cost.plot(each, [i] * len(each), linestyle="", marker="o", markersize=5, **look)
        marker = MARKERS[_kind(setting)]
        for seconds, run in found:
            if run.robust.value is not None:
                pays.plot(seconds, run.robust.value, linestyle="", marker=marker, markersize=9, **look)
    cost.set_yticks(range(len(timed)), [names[s] or s.loss for s in timed])
    cost.invert_yaxis()
    cost.grid(visible=False, axis="y")
    cost.set(title="Training of one member", xlabel="seconds")
    pays.set(
        title="Robust test accuracy (all points found)",
        xlabel="seconds of training, all members together",
        xlim=(0, None),
    )
    handles = [
        _entry(f"L = {n}", linestyle="", marker="o", color=LINE_COLOURS[i % len(LINE_COLOURS)])
        for i, n in enumerate(sizes)
    ]
    kinds = dict.fromkeys(map(_kind, timed))
    handles += [_entry(_KINDS[kind], linestyle="", marker=MARKERS[kind], color="#999999") for kind in kinds]
    pays.legend(handles=handles, loc="best", fontsize=11)
    devices = sorted({device for found in timed.values() for _, run in found if (device := run.results.device)})
    footnote(figure, "; ".join(["points: seeds; seconds include validation", *devices]))
    return figure


def _kind(setting: Setting) -> int:
    return 0 if setting.is_single else 3 if setting.schedule == SAMPLED else 2 if setting.solver == UNIFORM else 1


def main(root: str | Path, console: Console) -> list[Path]:
    """Print the differences between the settings of the runs in `root`, and write the table and figures into it."""
    root, runs = Path(root), find_runs(root)
    answers, notes = answers_of(runs)
    for note in notes:
        console.print(f"Not compared: {note}", style="yellow", markup=False, highlight=False)
    written = [save(build, root / name) for name, build in study_figures(runs).items()]
    if answers:
        print_whole(on_console(answers_table(answers)), console)
        written.append(write_answers(answers, root / "differences.csv"))
    for path in written:
        console.print(f"  {path}", markup=False, highlight=False, soft_wrap=True)
    return written


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python studies/figures.py DIR, the directory of a study's runs")
    main(sys.argv[1], Console(markup=False))
