"""Figures of runs of one eps: what came out, what training did epoch by epoch, and what it cost."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.report.figures.curves import column, weight_of
from mixadv.report.figures.style import DASHES, MARKERS, SIZES, footnote, key, member_style, new_figure, save
from mixadv.report.files import Run
from mixadv.report.records import ALL, APGD, CLEAN, PGD, measured
from mixadv.report.settings import SAMPLED, UNIFORM, Groups, Setting, grouped, headline, names_of, usual_epochs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_KINDS = ("one model", "learned weights", "equal weights", "sampled updates")
Curve = tuple[np.ndarray, np.ndarray]
TITLES = {
    CLEAN: "Clean test accuracy",
    PGD: "Robust: PGD-20",
    APGD: "Robust: APGD on the mixture",
    ALL: "Robust: all points found",
}


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


def accuracies_on_test(groups: Groups) -> dict[Setting, dict[str, list[float]]]:
    """By setting and measure, one number per run that has results; of damaged records those that the results hold."""
    values: dict[Setting, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for setting, runs in groups.items():
        for run in runs:
            if run.robust.value is None or run.clean.value is None:
                continue
            try:
                found = measured(run).accuracies
                means = {measure: float(each.mean()) for measure, each in found.items() if measure in TITLES}
            except ValueError:
                means = {CLEAN: run.clean.value, ALL: run.robust.value}
            for measure, mean in means.items():
                values[setting][measure].append(mean)
    return values


def accuracy_figure(groups: Groups, values: Mapping[Setting, Mapping[str, list[float]]]) -> Figure:
    """The first figure of `draw_study`; its axes are labelled by their measures."""
    measures = [m for m in TITLES if any(m in v for v in values.values())]
    settings = list(values)
    # Settings of one line differ in L alone.
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
    every = sum(map(len, groups.values()))
    if missing := every - sum(len(of_setting[CLEAN]) for of_setting in values.values()):
        notes.append(f"{missing} of {every} runs have no results and are not shown")
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
        colour, marker = SIZES[i % len(SIZES)], MARKERS[i % len(MARKERS)]
        # Side by side, where lines meet.
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
            # From the one model that was trained as long, if there is one.
            start = next((s for s in values if s.is_single and _beside(s, line[0])), None)
            if start is not None:
                at, means = [1 + aside, *at], [float(np.mean(values[start])), *means]
                low, high = [min(values[start]), *low], [max(values[start]), *high]
            axes.plot(at, means, color=colour, linewidth=1.5)
            axes.fill_between(at, low, high, color=colour, alpha=0.1, linewidth=0)


def _beside(single: Setting, mixture: Setting) -> bool:
    return (single.loss, single.epochs, single.rest) == (mixture.loss, mixture.epochs, mixture.rest)


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
    figure = new_figure(6.2, headline(groups))
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
    handles = [key(f"member {k}", color=member_style(k)["color"]) for k in range(most)]
    dashes = (DASHES[i % len(DASHES)] for i in range(len(seeds)))
    handles += [key(f"seed {s}", color="#222222", linestyle=dash) for s, dash in zip(seeds, dashes, strict=True)]
    handles.append(key("1/L", color="#555555", linestyle=":"))
    figure.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 0.1 / height), ncols=len(handles))
    return figure


def _lambdas(run: Run) -> int:
    """How many weights the history has."""
    return sum(name.startswith("lambda/") for name in run.history)


def timed_runs(groups: Groups) -> dict[Setting, list[tuple[float, Run]]]:
    """By setting the finished trainings, each with its seconds."""
    timed: dict[Setting, list[tuple[float, Run]]] = defaultdict(list)
    for setting, runs in groups.items():
        for run in runs:
            if not setting.origin and run.state == "done" and (seconds := run.training_seconds) is not None:
                timed[setting].append((seconds, run))
    return timed


def cost_figure(groups: Groups, timed: Mapping[Setting, Sequence[tuple[float, Run]]]) -> Figure:
    """The last figure of `draw_study`; its axes are labelled "cost" and "return"."""
    names = names_of(list(timed))
    height = max(5.5, 1.9 + 0.36 * len(timed))
    figure = new_figure(height, headline(groups))
    figure.subplots_adjust(left=0.2, right=0.985, bottom=1.1 / height, top=1 - 0.95 / height, wspace=0.13)
    cost, pays = figure.add_subplot(1, 2, 1, label="cost"), figure.add_subplot(1, 2, 2, label="return")
    sizes = sorted({s.num_members for s in timed})
    for i, (setting, found) in enumerate(timed.items()):
        look: dict[str, Any] = {"color": SIZES[sizes.index(setting.num_members) % len(SIZES)]}
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
    handles = [key(f"L = {n}", linestyle="", marker="o", color=SIZES[i % len(SIZES)]) for i, n in enumerate(sizes)]
    kinds = dict.fromkeys(map(_kind, timed))
    handles += [key(_KINDS[kind], linestyle="", marker=MARKERS[kind], color="#999999") for kind in kinds]
    pays.legend(handles=handles, loc="best", fontsize=11)
    devices = sorted({str(device) for found in timed.values() for _, run in found if (device := run.get("device"))})
    footnote(figure, "; ".join(["points: seeds; seconds include validation", *devices]))
    return figure


def _kind(setting: Setting) -> int:
    return 0 if setting.is_single else 3 if setting.schedule == SAMPLED else 2 if setting.solver == UNIFORM else 1
