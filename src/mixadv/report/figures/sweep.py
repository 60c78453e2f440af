"""The figure of a sweep over eps: test accuracy against the radius."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mixadv.errors import UserError
from mixadv.report.figures.style import CLEAN, DASHES, MARKERS, MEMBERS, ROBUST, footnote, new_figure, save, spaced
from mixadv.report.files import Run
from mixadv.report.names import format_eps, norm_symbol
from mixadv.report.settings import described

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (CLEAN, ROBUST, *MEMBERS)


def draw_sweep(runs: Sequence[Run], path: str | Path) -> Path:
    """Draw clean and robust test accuracy against eps, one line per setting, into `path` (a png).

    A setting is (L, loss, solver) and whatever else differs between runs that share these and eps, the seed
    excepted: only repetitions of one experiment are averaged, within a band from their minimum to their
    maximum. Dashed lines are the settings' baselines.

    Raises:
        UserError: no run has results, or `path` cannot be written.
    """
    if not any(_plottable(run) for run in runs):
        raise UserError(f"nothing to draw: none of the {len(runs)} runs has a robust accuracy in its results yet")
    return save(lambda: sweep_figure(runs), Path(path))


def sweep_figure(runs: Sequence[Run]) -> Figure:
    """The figure of `draw_sweep`; its axes are labelled "clean" and "robust"."""
    shown = [run for run in runs if _plottable(run)]
    lines: dict[tuple[Any, ...], list[Run]] = defaultdict(list)
    for run, extra in zip(shown, _extras(shown), strict=True):
        setting = (run.num_members or 0, run.loss, run.solver, *extra)
        lines[setting].append(run)

    labels = {setting: _label(setting, group) for setting, group in sorted(lines.items())}
    columns = _legend_columns(list(labels.values()))
    below = 1.4 + 0.27 * math.ceil(len(labels) / columns)
    height = below + 4.6
    data, norms = ({getattr(run, name) for run in shown} - {""} for name in ("data", "norm"))
    title = [", ".join(sorted(data)), ", ".join(map(norm_symbol, sorted(norms)))]
    figure = new_figure(height, " · ".join(part for part in title if part))
    figure.subplots_adjust(left=0.055, right=0.985, bottom=below / height, top=1 - 0.75 / height, wspace=0.12)
    clean = figure.add_subplot(1, 2, 1, label="clean")
    robust = figure.add_subplot(1, 2, 2, label="robust", sharex=clean, sharey=clean)
    notes: dict[str, None] = {}
    for i, (setting, group) in enumerate(sorted(lines.items())):
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        look: dict[str, Any] = {"color": colour, "marker": marker, "markersize": 6}
        by_x = _by_eps(group)
        bases = {x: [r.baseline for r in same if r.baseline is not None] for x, same in by_x.items()}
        for axes, measure in ((clean, "clean"), (robust, "robust")):
            dash = DASHES[i // len(COLOURS) % len(DASHES)]
            if _line(axes, by_x, measure, label=labels[setting], linestyle=dash, **look):
                notes["lines: mean over seeds, bands: minimum to maximum"] = None
            of_base = {**look, "label": f"_baseline {i}", "linestyle": "--", "markerfacecolor": "white"}
            if _line(axes, bases, measure, band=False, **of_base) is not None:
                notes["dashed, open markers: single-model baselines"] = None
    attacks = sorted({", ".join(run.attacks) for run in shown if run.attacks})
    if attacks:
        notes["robust: worst case per image over " + " | ".join(attacks)] = None
    if len(shown) < len(runs):
        notes[f"{len(runs) - len(shown)} of {len(runs)} runs have no results and are not shown"] = None
    _finish(clean, robust, {float(run.eps or 0) for run in shown})
    handles, names = clean.get_legend_handles_labels()
    figure.legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, (below - 0.62) / height), ncols=columns)
    footnote(figure, "; ".join(notes))
    return figure


def _plottable(run: Run) -> bool:
    return run.robust.value is not None and run.eps is not None


def _line(axes: Axes, by_x: Mapping[float, Sequence[Run]], measure: str, band: bool = True, **look: Any) -> bool | None:
    """Mean over the runs at each x; True if a band was drawn, None if there was nothing to draw."""
    values = {x: [v for run in same if (v := run.interval(measure).value) is not None] for x, same in by_x.items()}
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


def _finish(clean: Axes, robust: Axes, radii: set[float]) -> None:
    for axes, name in ((clean, "Clean test accuracy"), (robust, "Robust test accuracy")):
        axes.set(title=name, xlabel="ε (radius of the ball, in input units)", ylabel="accuracy")
    clean.set_ylim(0, 1)
    margin = 0.05 * (max(radii) - min(radii)) or 0.5
    clean.set_xlim(min(radii) - margin, max(radii) + margin)
    kept = spaced(radii, 0.08)
    clean.set_xticks(kept, [format_eps(x) for x in kept])


def _label(setting: tuple[Any, ...], group: Sequence[Run]) -> str:
    counts = [len(same) for same in _by_eps(group).values()]
    low, high = min(counts), max(counts)
    seeds = f" ({low if low == high else f'{low}–{high}'} seeds)" if high > 1 else ""
    return ", ".join(part for part in (f"L = {setting[0]}", *setting[1:]) if part) + seeds


def _by_eps(group: Sequence[Run]) -> dict[float, list[Run]]:
    by_eps: dict[float, list[Run]] = defaultdict(list)
    for run in group:
        by_eps[float(run.eps or 0)].append(run)
    return by_eps


def _legend_columns(labels: Sequence[str]) -> int:
    longest = max(map(len, labels))
    return 1 if longest > 75 else 2 if longest > 45 else 3


def _extras(runs: Sequence[Run]) -> list[tuple[str, ...]]:
    """Per run, "key=value" for every setting in which runs with equal (eps, L, loss, solver) differ."""
    flat = [{"data": run.data, "norm": run.norm, **described(run.config)} for run in runs]
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
