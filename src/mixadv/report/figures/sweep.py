"""The figure of several runs: test accuracy against eps, or against L where all runs have the same eps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixadv.errors import UserError
from mixadv.report.figures.style import DASHES, LINE_COLOURS, MARKERS, footnote, new_figure, save, spaced
from mixadv.report.files import Run
from mixadv.report.names import format_eps
from mixadv.report.panels import Panel, panels_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = LINE_COLOURS[1:]
_TITLE, _TOP, _AXES, _XLABEL, _ENTRY, _FOOT = 0.4, 0.85, 3.6, 0.75, 0.27, 0.7  # inches


def draw_sweep(runs: Sequence[Run], path: str | Path) -> Path:
    """Draw clean and robust test accuracy into `path` (a png): against eps, or against L if all runs have the same eps.

    There is a row for each panel (data, norm and protocol), and in it one line for each setting: L, loss, solver, and
    every other key, except for the seed, whose value differs between runs with equal L, loss, solver and eps. Each
    point is the mean over the runs of the setting (its seeds), with its 95 % interval over the test images, within a
    band from their minimum to their maximum. Dashed lines are the baselines.

    Raises:
        UserError: no run has results, or `path` cannot be written.
    """
    if not any(run.robust.value is not None for run in runs):
        raise UserError(f"nothing to draw: none of the {len(runs)} runs has a robust accuracy in its results yet")
    return save(lambda: sweep_figure(runs), Path(path))


def sweep_figure(runs: Sequence[Run]) -> Figure:
    """The figure of `draw_sweep`; the axes of panel i are labelled "clean i" and "robust i"."""
    panels = panels_of(runs)
    settings = [_lines(panel) for panel in panels]
    columns = [_legend_columns([label for label, _ in lines]) for lines in settings]
    entries = [math.ceil(len(lines) / number) for lines, number in zip(settings, columns, strict=True)]
    below = [_XLABEL + _ENTRY * count + 0.1 for count in entries]
    height = sum(below) + (_TOP + _AXES) * len(panels) + _FOOT + (_TITLE if len(panels) > 1 else 0)
    figure = new_figure(height, panels[0].title if len(panels) == 1 else "Each row has other data, norm or attacks")
    notes: dict[str, None] = {"bars: 95 % intervals over test images": None}
    top = height - (_TITLE if len(panels) > 1 else 0)
    for i, (panel, lines) in enumerate(zip(panels, settings, strict=True)):
        top -= _TOP
        axes = [
            figure.add_axes((left, (top - _AXES) / height, 0.435, _AXES / height), label=f"{name} {i}")
            for left, name in ((0.055, "clean"), (0.55, "robust"))
        ]
        _draw_panel(axes, panel, lines, notes)
        if len(panels) > 1:
            words: Any = {"fontsize": 15, "ha": "left", "va": "bottom", "parse_math": False}
            figure.text(0.02, (top + 0.32) / height, panel.title, **words)
        top -= _AXES
        handles, names = axes[0].get_legend_handles_labels()
        place = (0.5, (top - _XLABEL + 0.12) / height)
        figure.legend(handles, names, loc="upper center", bbox_to_anchor=place, ncols=columns[i])
        top -= below[i]
    attacks = sorted({", ".join(run.results.attacks) for panel in panels for run in panel.runs if run.results.attacks})
    if len(panels) == 1 and attacks:
        notes["robust: worst case per image over " + " | ".join(attacks)] = None
    if any(panel.numbered for panel in panels):
        notes["settings with a number: task=report lists them, and report.csv has them"] = None
    if missing := len(runs) - sum(len(panel.runs) for panel in panels):
        notes[f"{missing} of {len(runs)} runs have no results and are not shown"] = None
    footnote(figure, "; ".join(notes))
    return figure


def _lines(panel: Panel) -> list[tuple[str, list[Run]]]:
    """The lines of a panel: label and runs."""
    x_of = _eps if panel.over_eps else _size
    groups: dict[tuple[str, ...], list[Run]] = defaultdict(list)
    for run, differing in zip(panel.runs, panel.differing, strict=True):
        size = f"L = {_size(run):.0f}" if panel.over_eps else ""
        groups[size, run.loss or run.task, run.solver, differing].append(run)
    lines = []
    for setting, group in sorted(groups.items()):
        counts = [len(same) for same in _by(x_of, group).values()]
        low, high = min(counts), max(counts)
        several = f" ({low if low == high else f'{low}–{high}'} seeds)" if high > 1 else ""
        lines.append((", ".join(part for part in setting if part) + several, group))
    return lines


def _draw_panel(
    both: Sequence[Axes], panel: Panel, lines: Sequence[tuple[str, list[Run]]], notes: dict[str, None]
) -> None:
    over_eps = panel.over_eps
    x_of = _eps if over_eps else _size
    places = {x_of(run) for run in panel.runs}
    # Beside each other, so that equal values and their bars are seen.
    step = 0.01 * (max(places) - min(places) or 1.0) * min(1.0, 8 / len(lines))
    for i, (label, group) in enumerate(lines):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6}
        aside = (i - (len(lines) - 1) / 2) * step
        by_x = {x + aside: same for x, same in _by(x_of, group).items()}
        bases = {x: [r.baseline for r in same if r.baseline is not None] for x, same in by_x.items()}
        for axes, measure in zip(both, ("clean", "robust"), strict=True):
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            if _line(axes, by_x, measure, label=label, linestyle=dash, **look):
                notes["lines: mean over seeds, bands: minimum to maximum"] = None
            of_base = {**look, "label": f"_baseline {i}", "linestyle": "--", "markerfacecolor": "white"}
            if _line(axes, bases, measure, band=False, **of_base) is not None:
                notes["dashed, open markers: single-model baselines"] = None
    for axes, title in zip(both, ("Clean test accuracy", "Robust test accuracy"), strict=True):
        words = "ε (radius of the ball, in input units)" if over_eps else "L (number of members)"
        if not over_eps:
            title += f", ε = {format_eps(panel.runs[0].eps)}"
        axes.set(title=title, xlabel=words, ylabel="accuracy")
        _finish(axes, places, format_eps if over_eps else "{:.0f}".format)


def _eps(run: Run) -> float:
    return float(run.eps or 0)


def _size(run: Run) -> float:
    return float(run.num_members or 0)


def _line(axes: Axes, by_x: Mapping[float, Sequence[Run]], measure: str, band: bool = True, **look: Any) -> bool | None:
    """Draw the mean over the runs at each x; True with a band, False without one, None if no run has a value."""
    known = {x: [at for run in same if (at := getattr(run, measure)).value is not None] for x, same in by_x.items()}
    points = sorted((x, at) for x, at in known.items() if at)
    if not points:
        return None
    x = [at for at, _ in points]
    axes.plot(x, [_mean([at.value for at in v]) for _, v in points], **look)
    for place, at in points:
        if ends := [one.ends for one in at if one.ends is not None]:
            # The interval of a mean over seeds, on the same images, is at most as wide as the mean of the intervals.
            low, high = (_mean(side) for side in zip(*ends, strict=True))
            axes.plot([place, place], [low, high], color=look["color"], marker="_", linewidth=1.2, label="_interval")
    if not band or all(len(v) < 2 for _, v in points):
        return False
    least, most = ([end(at.value for at in v) for _, v in points] for end in (min, max))
    if len(x) > 1:
        axes.fill_between(x, least, most, color=look["color"], alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, least, most, color=look["color"], alpha=0.4, linewidth=5)
    return True


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _finish(axes: Axes, places: set[float], form: Callable[[float], str]) -> None:
    axes.set_ylim(0, 1)
    margin = 0.05 * (max(places) - min(places)) or 0.5
    axes.set_xlim(min(places) - margin, max(places) + margin)
    kept = spaced(places, 0.1)
    axes.set_xticks(kept, [form(x) for x in kept])


def _by(x_of: Callable[[Run], float], group: Sequence[Run]) -> dict[float, list[Run]]:
    by_x: dict[float, list[Run]] = defaultdict(list)
    for run in group:
        by_x[x_of(run)].append(run)
    return by_x


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels))
    return 1 if longest > 75 else 2 if longest > 45 else 3
