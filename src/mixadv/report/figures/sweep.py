"""The figure of a sweep: test accuracy against eps, or against L if all runs have the same eps."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixadv.errors import UserError
from mixadv.report.figures.style import DASHES, LINE_COLOURS, MARKERS, footnote, new_figure, save, spaced
from mixadv.report.files import Run
from mixadv.report.names import format_eps, norm_symbol
from mixadv.report.settings import relevant_settings

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = LINE_COLOURS[1:]


def draw_sweep(runs: Sequence[Run], path: str | Path) -> Path:
    """Draw clean and robust test accuracy into `path` (a png): against eps, or against L if all runs have the same eps.

    There is one line for each setting: L, loss, solver, and every other key, except for the seed, whose value differs
    between runs with equal L, loss, solver and eps. Each point is the mean over the runs of the setting (its seeds),
    within a band from their minimum to their maximum. Dashed lines are the baselines.

    Raises:
        UserError: no run has results, or `path` cannot be written.
    """
    if not any(run.robust.value is not None for run in runs):
        raise UserError(f"nothing to draw: none of the {len(runs)} runs has a robust accuracy in its results yet")
    return save(lambda: sweep_figure(runs), Path(path))


def sweep_figure(runs: Sequence[Run]) -> Figure:
    """The figure of `draw_sweep`; its axes are labelled "clean" and "robust"."""
    shown = [run for run in runs if run.robust.value is not None]
    over_eps = len({run.eps for run in shown} - {None}) > 1
    shown = [run for run in shown if run.eps is not None or not over_eps]
    x_of = _eps if over_eps else _size
    lines: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run, extra in zip(shown, _extras(shown), strict=True):
        size = f"L = {_size(run):.0f}" if over_eps else ""
        setting = (size, run.loss, run.solver, *extra)
        lines[setting].append(run)

    labels = {setting: _label(setting, _by(x_of, group)) for setting, group in sorted(lines.items())}
    columns = _legend_columns(list(labels.values()))
    below = 1.4 + 0.27 * math.ceil(len(labels) / columns)
    height = below + 4.6
    figure = new_figure(height, _title(shown, over_eps))
    figure.subplots_adjust(left=0.055, right=0.985, bottom=below / height, top=1 - 0.75 / height, wspace=0.12)
    clean = figure.add_subplot(1, 2, 1, label="clean")
    robust = figure.add_subplot(1, 2, 2, label="robust", sharex=clean, sharey=clean)
    notes: dict[str, None] = {}
    for i, (setting, group) in enumerate(sorted(lines.items())):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6}
        by_x = _by(x_of, group)
        bases = {x: [r.baseline for r in same if r.baseline is not None] for x, same in by_x.items()}
        for axes, measure in ((clean, "clean"), (robust, "robust")):
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            if _line(axes, by_x, measure, label=labels[setting], linestyle=dash, **look):
                notes["lines: mean over seeds, bands: minimum to maximum"] = None
            of_base = {**look, "label": f"_baseline {i}", "linestyle": "--", "markerfacecolor": "white"}
            if _line(axes, bases, measure, band=False, **of_base) is not None:
                notes["dashed, open markers: single-model baselines"] = None
    attacks = sorted({", ".join(run.results.attacks) for run in shown if run.results.attacks})
    if attacks:
        notes["robust: worst case per image over " + " | ".join(attacks)] = None
    if len(shown) < len(runs):
        notes[f"{len(runs) - len(shown)} of {len(runs)} runs have no results and are not shown"] = None
    for axes, name in ((clean, "Clean test accuracy"), (robust, "Robust test accuracy")):
        words = "ε (radius of the ball, in input units)" if over_eps else "L (number of members)"
        axes.set(title=name, xlabel=words, ylabel="accuracy")
    _finish(clean, {x_of(run) for run in shown}, format_eps if over_eps else "{:.0f}".format)
    handles, names = clean.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, (below - 0.62) / height), ncols=columns)
    footnote(figure, "; ".join(notes))
    return figure


def _eps(run: Run) -> float:
    return float(run.eps or 0)


def _size(run: Run) -> float:
    return float(run.num_members or 0)


def _title(runs: Sequence[Run], over_eps: bool) -> str:
    data, norms = ({getattr(run, name) for run in runs} - {""} for name in ("data", "norm"))
    parts = [", ".join(sorted(data)), ", ".join(map(norm_symbol, sorted(norms)))]
    parts.append("" if over_eps else f"ε = {format_eps(runs[0].eps)}")
    return " · ".join(part for part in parts if part)


def _line(axes: Axes, by_x: Mapping[float, Sequence[Run]], measure: str, band: bool = True, **look: Any) -> bool | None:
    """Draw the mean over the runs at each x; True with a band, False without one, None if no run has a value."""
    values = {x: [v for run in same if (v := getattr(run, measure).value) is not None] for x, same in by_x.items()}
    points = sorted((x, at) for x, at in values.items() if at)
    if not points:
        return None
    x = [at for at, _ in points]
    axes.plot(x, [sum(v) / len(v) for _, v in points], **look)
    if not band or all(len(v) < 2 for _, v in points):
        return False
    low, high = [min(v) for _, v in points], [max(v) for _, v in points]
    if len(x) > 1:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0)
    else:
        axes.vlines(x, low, high, color=look["color"], alpha=0.4, linewidth=5)
    return True


def _finish(axes: Axes, places: set[float], form: Callable[[float], str]) -> None:
    axes.set_ylim(0, 1)
    margin = 0.05 * (max(places) - min(places)) or 0.5
    axes.set_xlim(min(places) - margin, max(places) + margin)
    kept = spaced(places, 0.08)
    axes.set_xticks(kept, [form(x) for x in kept])


def _label(setting: tuple[Any, ...], by_x: Mapping[float, Sequence[Run]]) -> str:
    counts = [len(same) for same in by_x.values()]
    low, high = min(counts), max(counts)
    seeds = f" ({low if low == high else f'{low}–{high}'} seeds)" if high > 1 else ""
    return (", ".join(part for part in setting if part) or "only measured") + seeds


def _by(x_of: Callable[[Run], float], group: Sequence[Run]) -> dict[float, list[Run]]:
    by_x: dict[float, list[Run]] = defaultdict(list)
    for run in group:
        by_x[x_of(run)].append(run)
    return by_x


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels))
    return 1 if longest > 75 else 2 if longest > 45 else 3


def _extras(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Per run, "key=value" for every setting in which runs with equal (eps, L, loss, solver) differ."""
    # The configuration of a measurement does not describe the training of its members.
    trained = [{} if run.was_only_measured else relevant_settings(run.config) for run in runs]
    flat = [{"data": run.data, "norm": run.norm, **own} for run, own in zip(runs, trained, strict=True)]
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        groups[run.eps, run.num_members, run.loss, run.solver].append(i)
    varied = {
        key
        for members in groups.values()
        for key in {key for i in members for key in flat[i]}
        if len({repr(flat[i].get(key)) for i in members}) > 1
    }
    return [tuple(f"{key}={flat[i][key]}" for key in sorted(varied) if key in flat[i]) for i in range(len(runs))]
