"""Figures of an evaluation: accuracy per attack, accuracy against eps, loss against steps."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.redaction import printable
from mixadv.report.attacks import TWIN, WHOLE, Lines, attack_rows, classifiers, lines_of, shown_as, worst_cases
from mixadv.report.figures.examples import Examples, examples_figure
from mixadv.report.figures.regions import Regions, regions_figure
from mixadv.report.figures.style import CLEAN_COLOUR, ROBUST_COLOUR, footnote, member_style, new_figure, spaced
from mixadv.report.files import Run
from mixadv.report.names import format_eps, norm_symbol
from mixadv.report.records import CONSTANT, VOTE
from mixadv.report.tables import headline
from mixadv.results import UNKNOWN, Accuracy, Counterparts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = "all points found"
_LOOKS: Any = {
    "mixture": {
        "color": ROBUST_COLOUR,
        "marker": "s",
        "markersize": 8,
        "linestyle": "-",
        "linewidth": 2.8,
        "zorder": 4,
    },
    TWIN: {
        "color": CLEAN_COLOUR,
        "marker": "D",
        "markersize": 6,
        "linestyle": "--",
        "markerfacecolor": "white",
        "zorder": 3,
    },
    VOTE: {"color": "#222222", "marker": "*", "markersize": 9, "linestyle": "", "zorder": 3},
    CONSTANT: {"color": "#777777", "marker": "x", "markersize": 7, "linestyle": "", "zorder": 3},
}
_MARKERS = "o^vPX*<>"  # of members: more markers than colours, so that the pairs differ
_LEGEND, _ABOVE, _BELOW = 2.35, 0.65, 1.15  # inches
_TWIN_NOTE = "Averaged twin: argmax of the averaged probabilities, another classifier."


def evaluation_figures(
    run: Run, examples: Examples | None, regions: Regions | None = None
) -> dict[str, Callable[[], Figure]]:
    """File name -> function that builds its figure, for the figures with data.

    For `examples` see `read_examples`, for `regions` `read_regions`.
    """
    figures: dict[str, Callable[[], Figure]] = {}
    if any(at.value is not None for row in attack_rows(run) for at in row.values.values()):
        figures["attacks.png"] = partial(attacks_figure, run)
    if (lines := eps_lines(run)) is not None:
        figures["eps.png"] = partial(eps_figure, run, lines)
    if (lines := steps_lines(run)) is not None:
        figures["steps.png"] = partial(steps_figure, run, lines)
    if examples is not None:
        figures["examples.png"] = partial(examples_figure, run, examples)
    if regions is not None:
        figures["regions.png"] = partial(regions_figure, run, regions)
    return figures


def eps_lines(run: Run) -> Lines | None:
    """Accuracies against eps; None if the results have none."""
    return lines_of(run, run.results.curves.eps if run.results.curves else None)


def steps_lines(run: Run) -> Lines | None:
    """Losses against steps; None if the results have none."""
    return lines_of(run, run.results.curves.steps if run.results.curves else None)


def look(who: str) -> dict[str, Any]:
    """Colour, marker and line of a classifier, the same in all figures of an evaluation."""
    if who.startswith("member "):
        k = int(who.removeprefix("member "))
        return {**member_style(k), "marker": _MARKERS[k % len(_MARKERS)], "markersize": 5.5}
    return dict(_LOOKS["mixture" if who in WHOLE else who])


def attacks_figure(run: Run) -> Figure:
    """Accuracy of each classifier when it is attacked itself, one row per attack; its axes are labelled "attacks".

    The last row is the worst case over all points found. A line and a band show that of the mixture with its 95 %
    interval.
    """
    rows, worst, targets = attack_rows(run), worst_cases(run), classifiers(run)
    # Counterparts that no attack of the protocol is run against have a place in the last row alone.
    known = run.results.counterparts or Counterparts()
    also = {name: one.robust for name, one in ((VOTE, known.vote), (CONSTANT, known.constant)) if one is not None}
    worst, targets = {**worst, **also}, [*targets, *also]
    names = [*(_shortened(row.name) for row in rows), ALL]
    tall = max(0.5, 0.11 * len(targets) + 0.1)
    height = _ABOVE + _BELOW + max(tall * len(names), 0.29 * len(targets) + 0.8)
    figure, axes = _panel(run, "attacks", 0.35 + 0.105 * max(map(len, names)), height)
    offsets = np.linspace(-0.32, 0.32, len(targets)) if len(targets) > 1 else [0.0]
    for who, offset in zip(targets, offsets, strict=True):
        style = {**look(who), "linestyle": ""}
        shown = [*(row.values.get(who, UNKNOWN) for row in rows), worst[who]]
        _draw_intervals(axes, shown, float(offset), shown_as(run, who), style)
    name, final = targets[0], worst[targets[0]]
    if final.value is not None:
        axes.axvline(final.value, color=ROBUST_COLOUR, linewidth=1.4, label="worst case", zorder=1)
        if final.ends is not None:
            axes.axvspan(*final.ends, color=ROBUST_COLOUR, alpha=0.12, linewidth=0, label="its 95 % interval")
    axes.axhline(len(rows) - 0.5, color="#BBBBBB", linewidth=1)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    low, high = axes.get_xlim()
    spread = max(0.0, 0.1 - (high - low)) / 2
    axes.set(xlim=(max(low - spread, -0.01), min(high + spread, 1.01)), xlabel="accuracy")
    _legend(figure, axes)
    notes = ["Every classifier is attacked itself; the last row is its worst case over the points of all attacks."]
    if name == "mixture":
        notes.append(f"Mixture: exact expected accuracy. {_TWIN_NOTE}")
    footnote(figure, " ".join([*notes, "Bars and band: 95 % intervals over test images."]))
    return figure


def _draw_intervals(axes: Axes, at: list[Accuracy], offset: float, who: str, style: dict[str, Any]) -> None:
    """Draw a marker for each known value, and a bar over its interval."""
    known = [(row + offset, here) for row, here in enumerate(at) if here.value is not None]
    axes.plot([here.value or 0.0 for _, here in known], [y for y, _ in known], label=who, **style)
    for y, here in known:
        if here.ends is not None:
            axes.plot(here.ends, [y, y], color=style["color"], linewidth=1.6, marker="|", label=f"_{who}")


def eps_figure(run: Run, curve: Lines) -> Figure:
    """Accuracy against eps, with a band for the mixture's 95 % interval; its axes are labelled "eps"."""
    figure, axes = _panel(run, "eps")
    count = _count(run)
    _draw_lines(axes, run, curve)
    first = next(iter(curve.of))
    if count is not None and first in WHOLE:
        ends = [Accuracy.of(float(v), count).ends or (math.nan, math.nan) for v in curve.of[first]]
        low, high = zip(*ends, strict=True)
        axes.fill_between(curve.x, low, high, color=ROBUST_COLOUR, alpha=0.12, linewidth=0, label=f"{first}, 95 %")
    if run.eps is not None:
        axes.axvline(run.eps, color="#555555", linestyle=":", linewidth=1.5, label=f"ε = {format_eps(run.eps)}")
    kept = spaced(curve.x, 0.055)
    axes.set_xticks(kept, [format_eps(x) for x in kept])
    axes.set_ylim(0, 1)
    axes.set_xlabel(printable(f"ε (radius of the {norm_symbol(run.norm)} ball, in input units)"), parse_math=False)
    axes.set_ylabel("accuracy")
    _legend(figure, axes)
    footnote(figure, _note("Accuracy should fall to 0 when the ball contains all images.", count, curve))
    return figure


def steps_figure(run: Run, curve: Lines) -> Figure:
    """Loss of the attack against its number of steps; its axes are labelled "steps"."""
    figure, axes = _panel(run, "steps")
    _draw_lines(axes, run, curve)
    steps = sorted({float(x) for x in curve.x})
    some = [x for x in steps if x > 0]
    if len(some) > 2 and some[-1] / some[0] > 20:
        axes.set_xscale("symlog", linthresh=some[0], linscale=0.5)
        axes.set_xticks(steps, [f"{x:g}" for x in steps])
        axes.minorticks_off()
    axes.set(xlabel="steps of the attack", ylabel="loss at the points found")
    _legend(figure, axes)
    count = _count(run)
    footnote(figure, _note("A flat end means that further steps would gain nothing.", count, curve))
    return figure


def _panel(run: Run, name: str, left: float = 0.85, height: float = 5.6) -> tuple[Figure, Axes]:
    figure = new_figure(height, headline(run))
    box = (left / 14, _BELOW / height, (14 - left - _LEGEND) / 14, (height - _ABOVE - _BELOW) / height)
    return figure, figure.add_axes(box, label=name)


def _count(run: Run) -> int | None:
    return run.results.curves.num_examples if run.results.curves else None


def _draw_lines(axes: Axes, run: Run, curve: Lines) -> None:
    for who, values in curve.of.items():
        axes.plot(curve.x, values, label=shown_as(run, who), **look(who))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    box = axes.get_position()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(box.x1 + 0.005, box.y1 + 0.02), handlelength=2.4)


def _note(text: str, count: int | None, curve: Lines) -> str:
    counted = [] if count is None else [f"On {count:,} test images."]
    return " ".join([*counted, text, *([_TWIN_NOTE] if TWIN in curve.of else [])])


def _shortened(name: str, most: int = 30) -> str:
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"
