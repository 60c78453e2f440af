"""Figures of an evaluation: accuracy per attack and against eps, loss against steps, attacked images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.redaction import printable
from mixadv.report.attacks import TWIN, WHOLE, Curve, attack_rows, classifiers, read_curve, wilson, worst_cases
from mixadv.report.figures.examples import examples_figure, read_examples
from mixadv.report.figures.style import CLEAN, ROBUST, footnote, member_style, new_figure, spaced
from mixadv.report.files import Interval, Run
from mixadv.report.names import format_eps, norm_symbol, number
from mixadv.report.tables import headline_parts

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ALL = "all points found"
_LOOKS: Any = {
    "mixture": {"color": ROBUST, "marker": "s", "markersize": 8, "linestyle": "-", "linewidth": 2.8, "zorder": 4},
    TWIN: {"color": CLEAN, "marker": "D", "markersize": 6, "linestyle": "--", "markerfacecolor": "white", "zorder": 3},
}
_MARKERS = "o^vPX*<>"  # of members: more of them than colours
_LEGEND, _ABOVE, _BELOW = 2.35, 0.65, 1.15  # inches
_TWIN_NOTE = "Averaged twin: argmax of the averaged probabilities, another classifier."


def evaluation_figures(run: Run) -> tuple[dict[str, Callable[[], Figure]], list[str]]:
    """File name -> what builds its figure, for those that have data; and a line on each thing that is damaged."""
    figures: dict[str, Callable[[], Figure]] = {}
    damage: list[str] = []
    if any(value is not None for row in attack_rows(run) for value in row.values.values()):
        figures["attacks.png"] = partial(attacks_figure, run)
    readers: dict[str, Callable[[], Callable[[], Figure] | None]] = {
        "eps.png": lambda: _of(eps_figure, run, read_curve(run, "eps")),
        "steps.png": lambda: _of(steps_figure, run, read_curve(run, "steps")),
        "examples.png": lambda: _of(examples_figure, run, read_examples(run)),
    }
    for name, read in readers.items():
        with noting(damage):
            if (build := read()) is not None:
                figures[name] = build
    return figures, damage


@contextmanager
def noting(damage: list[str]) -> Iterator[None]:
    """A ValueError in the block becomes a line of `damage`."""
    try:
        yield
    except ValueError as error:
        damage.append(" ".join(str(error).split()))


def _of(draw: Callable[..., Figure], run: Run, data: Any) -> Callable[[], Figure] | None:
    return None if data is None else partial(draw, run, data)


def look(who: str) -> dict[str, Any]:
    """Colour, marker and line of a classifier, the same in every figure of an evaluation."""
    if who.startswith("member "):
        k = int(who.removeprefix("member "))
        return {**member_style(k), "marker": _MARKERS[k % len(_MARKERS)], "markersize": 5.5}
    return dict(_LOOKS["mixture" if who in WHOLE else who])


def attacks_figure(run: Run) -> Figure:
    """Accuracy of every classifier under every attack against itself, one row per attack; its axes: "attacks".

    The last row, a line and a band are the worst case over all points found, with its 95 % interval.
    """
    rows, worst, everybody = attack_rows(run), worst_cases(run), classifiers(run)
    names = [*(_shortened(row.name) for row in rows), ALL]
    tall = max(0.5, 0.11 * len(everybody) + 0.1)
    height = _ABOVE + _BELOW + max(tall * len(names), 0.29 * len(everybody) + 0.8)
    figure, axes = _panel(run, "attacks", 0.35 + 0.105 * max(map(len, names)), height)
    offsets = np.linspace(-0.32, 0.32, len(everybody)) if len(everybody) > 1 else [0.0]
    for who, offset in zip(everybody, offsets, strict=True):
        style = {**look(who), "linestyle": ""}
        spans = [row.mixture if who in WHOLE else Interval(row.values[who]) for row in rows]
        _draw_intervals(axes, [*spans, worst[who]], float(offset), who, style)
    name, final = everybody[0], worst[everybody[0]]
    if final.value is not None:
        axes.axvline(final.value, color=ROBUST, linewidth=1.4, label="worst case", zorder=1)
        if final.low is not None and final.high is not None:
            axes.axvspan(final.low, final.high, color=ROBUST, alpha=0.12, linewidth=0, label="its 95 % interval")
    axes.axhline(len(rows) - 0.5, color="#BBBBBB", linewidth=1)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.grid(visible=False, axis="y")
    low, high = axes.get_xlim()
    spread = max(0.0, 0.1 - (high - low)) / 2
    axes.set(xlim=(max(low - spread, -0.01), min(high + spread, 1.01)), xlabel="accuracy")
    _legend(figure, axes)
    notes = ["Every classifier is attacked itself; the last row is its worst case over all points found by anyone."]
    if name == "mixture":
        notes.append(f"Mixture: exact expected accuracy. {_TWIN_NOTE}")
    footnote(figure, " ".join([*notes, "Bars and band: 95 % intervals over test images."]))
    return figure


def _draw_intervals(axes: Axes, at: list[Interval], offset: float, who: str, style: dict[str, Any]) -> None:
    """A marker per row that has a value, and a bar where it has an interval."""
    known = [(row + offset, here) for row, here in enumerate(at) if here.value is not None]
    axes.plot([here.value or 0.0 for _, here in known], [y for y, _ in known], label=who, **style)
    for y, here in known:
        if here.low is not None and here.high is not None:
            axes.plot([here.low, here.high], [y, y], color=style["color"], linewidth=1.6, marker="|", label=f"_{who}")


def eps_figure(run: Run, curve: Curve) -> Figure:
    """Accuracy against eps, with a band for the mixture's 95 % interval; its axes: "eps"."""
    figure, axes = _panel(run, "eps")
    count = number(run.get("curves", "num_examples"))
    _draw_lines(axes, curve)
    first = next(iter(curve.lines))
    if count is not None and first in WHOLE:
        band = [wilson(None if math.isnan(v) else float(v), int(count)) for v in curve.lines[first]]
        low = [math.nan if at.low is None else at.low for at in band]
        high = [math.nan if at.high is None else at.high for at in band]
        axes.fill_between(curve.x, low, high, color=ROBUST, alpha=0.12, linewidth=0, label=f"{first}, 95 %")
    if run.eps is not None:
        axes.axvline(run.eps, color="#555555", linestyle=":", linewidth=1.5, label=f"ε = {format_eps(run.eps)}")
    kept = spaced(curve.x, 0.055)
    axes.set_xticks(kept, [format_eps(x) for x in kept])
    axes.set_ylim(0, 1)
    axes.set_xlabel(printable(f"ε (radius of the {norm_symbol(run.norm)} ball, in input units)"), parse_math=False)
    axes.set_ylabel("accuracy")
    _legend(figure, axes)
    footnote(figure, _note("Accuracy should fall to nothing where the ball holds every image.", count, curve))
    return figure


def steps_figure(run: Run, curve: Curve) -> Figure:
    """Loss that the attack reached against its number of steps; its axes: "steps"."""
    figure, axes = _panel(run, "steps")
    _draw_lines(axes, curve)
    steps = sorted({float(x) for x in curve.x})
    some = [x for x in steps if x > 0]
    if len(some) > 2 and some[-1] / some[0] > 20:
        axes.set_xscale("symlog", linthresh=some[0], linscale=0.5)
        axes.set_xticks(steps, [f"{x:g}" for x in steps])
        axes.minorticks_off()
    axes.set(xlabel="steps of the attack", ylabel="loss at the points found")
    _legend(figure, axes)
    count = number(run.get("curves", "num_examples"))
    footnote(figure, _note("A flat end says that further steps find nothing more.", count, curve))
    return figure


def _panel(run: Run, name: str, left: float = 0.85, height: float = 5.6) -> tuple[Figure, Axes]:
    figure = new_figure(height, " · ".join(headline_parts(run)) or run.path.name)
    box = (left / 14, _BELOW / height, (14 - left - _LEGEND) / 14, (height - _ABOVE - _BELOW) / height)
    return figure, figure.add_axes(box, label=name)


def _draw_lines(axes: Axes, curve: Curve) -> None:
    for who, values in curve.lines.items():
        axes.plot(curve.x, values, label=who, **look(who))


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    box = axes.get_position()
    figure.legend(handles, labels, loc="upper left", bbox_to_anchor=(box.x1 + 0.005, box.y1 + 0.02), handlelength=2.4)


def _note(text: str, count: float | None, curve: Curve) -> str:
    counted = [] if count is None else [f"On {count:,.0f} test images."]
    return " ".join([*counted, text, *([_TWIN_NOTE] if TWIN in curve.lines else [])])


def _shortened(name: str, most: int = 30) -> str:
    name = printable(name)
    return name if len(name) <= most else f"{name[: most - 11]}…{name[-10:]}"
