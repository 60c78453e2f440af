"""Figures of runs of one eps: what came out, and what it cost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.report.differences import ALL, APGD, CLEAN, PGD, measured
from mixadv.report.figures import DASHES, MARKERS, SIZES, footnote, new_figure
from mixadv.report.files import Run
from mixadv.report.settings import SAMPLED, UNIFORM, Groups, Setting, headline, names_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TITLES = {
    CLEAN: "Clean test accuracy",
    PGD: "Robust: PGD-20",
    APGD: "Robust: APGD on the mixture",
    ALL: "Robust: all points found",
}


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
    figure = new_figure(height)
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
    figure.suptitle(headline(groups), fontsize=16, y=1 - 0.12 / height)
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
    figure = new_figure(height)
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
    cost.set_title("Training of one member")
    cost.set_xlabel("seconds")
    pays.set_title("Robust test accuracy (all points found)")
    pays.set_xlabel("seconds of training, all members together")
    pays.set_xlim(left=0)
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], linestyle="", marker="o", color=SIZES[i % len(SIZES)], label=f"L = {size}")
        for i, size in enumerate(sizes)
    ]
    kinds = dict.fromkeys((_kind(s), _kind_name(s)) for s in timed)
    handles += [Line2D([], [], linestyle="", marker=MARKERS[k], color="#999999", label=name) for k, name in kinds]
    pays.legend(handles=handles, loc="best", fontsize=11)
    devices = sorted({str(device) for found in timed.values() for _, run in found if (device := run.get("device"))})
    figure.suptitle(headline(groups), fontsize=16, y=1 - 0.12 / height)
    footnote(figure, "; ".join(["points: seeds; seconds include validation", *devices]))
    return figure


def _kind(setting: Setting) -> int:
    return 0 if setting.is_single else 3 if setting.schedule == SAMPLED else 2 if setting.solver == UNIFORM else 1


def _kind_name(setting: Setting) -> str:
    return ("one model", "learned weights", "equal weights", "sampled updates")[_kind(setting)]
