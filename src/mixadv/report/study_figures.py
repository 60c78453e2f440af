"""Figures of runs of one eps: what training did, epoch by epoch."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.report.figures import DASHES, MARKERS, SIZES, column, footnote, member_style, new_figure, save
from mixadv.report.files import Run
from mixadv.report.settings import UNIFORM, Groups, Setting, grouped, headline, names_of, usual_epochs
from mixadv.report.study_results import accuracies_on_test, accuracy_figure, cost_figure, timed_runs

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[np.ndarray, np.ndarray]


def draw_study(runs: Sequence[Run], root: str | Path) -> list[Path]:
    """Draw what `runs` (of one eps) have: `report.png`, `training.png`, `weights.png` and `cost.png` in `root`.

    report.png: clean accuracy, and robust accuracy under PGD-20, under APGD and at all points found, against L; lines
    are means over seeds, bands reach from their minimum to their maximum. training.png: validation accuracy under the
    validation attack after every epoch, a panel for each loss. weights.png: lambda during training. cost.png: seconds
    of training for each member, and robust accuracy against the seconds of the whole training.

    Raises:
        UserError: `root` cannot be written.
    """
    return [save(build, Path(root) / name) for name, build in study_figures(runs).items()]


def study_figures(runs: Sequence[Run]) -> dict[str, Callable[[], Figure]]:
    """By the names of their files, how the figures of `draw_study` are built that have something to show."""
    groups = grouped(runs)
    figures: dict[str, tuple[Any, Any]] = {
        "report.png": (accuracy_figure, accuracies_on_test(groups)),
        "training.png": (training_figure, validation_curves(groups)),
        "weights.png": (weights_figure, learned_weights(groups)),
        "cost.png": (cost_figure, timed_runs(groups)),
    }
    return {name: partial(build, groups, shown) for name, (build, shown) in figures.items() if shown}


def validation_curves(groups: Groups) -> dict[Setting, list[Curve]]:
    """By setting, of each run that has them: epochs [n] and validation accuracies under attack [n]."""
    curves: dict[Setting, list[Curve]] = defaultdict(list)
    for setting, runs in groups.items():
        for run in runs:
            epochs, values = column(run, "val/robust_accuracy")
            if len(epochs) and not setting.origin:
                curves[setting].append((epochs, values))
    return curves


def training_figure(groups: Groups, curves: Mapping[Setting, Sequence[Curve]]) -> Figure:
    """The second figure of `draw_study`; its axes are labelled by their losses."""
    usual = usual_epochs(list(curves))
    shown = [s for s in curves if s.epochs == usual]
    names = names_of(shown)
    losses = sorted({s.loss for s in shown})
    figure = new_figure(6.2)
    figure.subplots_adjust(left=0.07, right=0.985, bottom=0.3, top=0.86, wspace=0.08)
    first: Any = None
    sizes = sorted({s.num_members for s in shown})
    for i, loss in enumerate(losses):
        axes = figure.add_subplot(1, len(losses), i + 1, label=loss, sharey=first)
        first = first or axes
        seen: Counter[int] = Counter()
        for setting in (s for s in shown if s.loss == loss):
            x, y = _by_seed(curves[setting])
            # Settings of one L have one colour, and a dash each.
            kind = seen[setting.num_members]
            seen[setting.num_members] += 1
            look: dict[str, Any] = {"color": SIZES[sizes.index(setting.num_members) % len(SIZES)]}
            label = names[setting].removeprefix(f"{loss}, ") + (f" ({len(y)} seeds)" if len(y) > 1 else "")
            dash, marker = DASHES[kind % len(DASHES)], MARKERS[kind % len(MARKERS)] if len(x) <= 30 else ""
            axes.plot(x, np.nanmean(y, axis=0), linestyle=dash, marker=marker, markersize=5, label=label, **look)
            if len(y) > 1:
                axes.fill_between(x, np.nanmin(y, axis=0), np.nanmax(y, axis=0), alpha=0.13, linewidth=0, **look)
        axes.set_title(loss)
        axes.tick_params(axis="y", labelleft=i == 0)
        axes.set_xlabel("epochs per model")
        axes.set_xlim(left=0)
        handles, labels = axes.get_legend_handles_labels()
        box = axes.get_position()
        place = ((box.x0 + box.x1) / 2, 0.195)
        figure.legend(handles, labels, loc="upper center", bbox_to_anchor=place, ncols=2 if len(losses) > 1 else 4)
    first.set_ylabel("validation accuracy under attack")
    figure.suptitle(headline(groups), fontsize=16, y=0.98)
    notes = "lines: mean over seeds, bands: minimum to maximum"
    others = sorted({f"{s.epochs:g}" for s in curves if s.epochs != usual and s.epochs is not None})
    footnote(figure, notes + (f"; trainings of {' and '.join(others)} epochs are not shown" if others else ""))
    return figure


def _by_seed(curves: Sequence[Curve]) -> tuple[np.ndarray, np.ndarray]:
    """All epochs [n] of the curves, and their values [seeds, n], nan where one has not come so far."""
    rounded = [dict(zip(np.round(x, 6).tolist(), y.tolist(), strict=True)) for x, y in curves]
    epochs = sorted(set().union(*rounded))
    return np.array(epochs), np.array([[of_seed.get(at, math.nan) for at in epochs] for of_seed in rounded])


def learned_weights(groups: Groups) -> dict[Setting, list[Run]]:
    """The runs, by setting, that learn lambda and have begun to."""
    learned = {
        setting: [run for run in runs if len(column(run, "lambda/0")[0])]
        for setting, runs in groups.items()
        if setting.num_members > 1 and not setting.origin and setting.solver != UNIFORM
    }
    return {setting: runs for setting, runs in learned.items() if runs}


def weights_figure(groups: Groups, learned: Groups) -> Figure:
    """The third figure of `draw_study`."""
    names = names_of(list(learned))
    columns = min(3, len(learned))
    rows = math.ceil(len(learned) / columns)
    height = 1.6 + 3.4 * rows
    figure = new_figure(height)
    top, bottom = 1 - 0.95 / height, 1.3 / height
    figure.subplots_adjust(left=0.055, right=0.985, bottom=bottom, top=top, wspace=0.1, hspace=0.42)
    seeds = sorted({run.seed or 0 for runs in learned.values() for run in runs})
    most = max(_lambdas(run) for runs in learned.values() for run in runs)
    first: Any = None
    for i, (setting, runs) in enumerate(learned.items()):
        first = axes = figure.add_subplot(rows, columns, i + 1, label=names[setting], sharey=first)
        for run in runs:
            end = float(np.nanmax(run.history["epoch"], initial=0.0))
            for k in range(_lambdas(run)):
                x, y = column(run, f"lambda/{k}")
                if not len(x):
                    continue
                # Weights keep their value from one weights phase to the next.
                x, y = np.append(x, max(end, x[-1])), np.append(y, y[-1])
                dash = DASHES[seeds.index(run.seed or 0) % len(DASHES)]
                axes.plot(x, y, drawstyle="steps-post", color=member_style(k)["color"], linestyle=dash)
        axes.axhline(1 / setting.num_members, color="#555555", linestyle=":", linewidth=1.5)
        axes.set_title(names[setting] or setting.loss)
        axes.set_xlim(left=0)
        axes.tick_params(axis="y", labelleft=i % columns == 0)
        if i % columns == 0:
            axes.set_ylabel("weight λ")
        if i >= len(learned) - columns:
            axes.set_xlabel("epochs per model")
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=member_style(k)["color"], label=f"member {k}") for k in range(most)]
    handles += [
        Line2D([], [], color="#222222", linestyle=DASHES[i % len(DASHES)], label=f"seed {seed}")
        for i, seed in enumerate(seeds)
    ]
    handles.append(Line2D([], [], color="#555555", linestyle=":", label="1/L"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.1 / height), ncols=len(handles))
    figure.suptitle(headline(groups), fontsize=16, y=1 - 0.12 / height)
    return figure


def _lambdas(run: Run) -> int:
    """How many weights the history has."""
    return sum(name.startswith("lambda/") for name in run.history)
