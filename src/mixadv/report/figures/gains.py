"""The figure over several data sets: mixtures, their counterparts and both ceilings."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mixadv.redaction import printable
from mixadv.report.cells import text_of
from mixadv.report.figures.style import CLEAN_COLOUR, DASHES, LOSS_COLOUR, VALUE_COLOUR, footnote, new_figure, save
from mixadv.report.gains import COUNTERPARTS, MIXTURE, Standing
from mixadv.report.names import format_ball

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_IN_A_ROW = 3
_LEFT, _RIGHT, _TITLE, _LINE, _AXES, _BELOW, _FOOT = 1.75, 0.75, 0.65, 0.24, 2.7, 0.55, 1.05  # inches


def draw_gains(found: Sequence[Standing], path: str | Path) -> Path:
    """Draw `gains_figure` into `path` (a png).

    Raises:
        UserError: `path` cannot be written.
    """
    return save(lambda: gains_figure(found), Path(path))


def gains_figure(found: Sequence[Standing]) -> Figure:
    """One panel for each run: accuracies under attack with their 95 % intervals, and lines at both ceilings.

    The axes of panel i are labelled "gains i".
    """
    columns = min(len(found), _IN_A_ROW)
    width = (14 - _LEFT - columns * _RIGHT) / columns
    # About 9 letters of a title an inch.
    titles = [textwrap.wrap(_about(one), int(9.5 * (width + 0.3)), max_lines=3, placeholder=" …") for one in found]
    rows = [range(first, min(first + _IN_A_ROW, len(found))) for first in range(0, len(found), _IN_A_ROW)]
    above = [_LINE * max(len(titles[i]) for i in row) + 0.1 for row in rows]
    height = _TITLE + sum(above) + len(rows) * (_AXES + _BELOW) + _FOOT
    figure = new_figure(height, "What randomising gains: accuracy under attack")
    top = height - _TITLE
    for row, needed in zip(rows, above, strict=True):
        top -= needed + _AXES
        for column, i in enumerate(row):
            left = _LEFT + column * (width + _RIGHT)
            box = (left / 14, top / height, width / 14, _AXES / height)
            axes = figure.add_axes(box, label=f"gains {i}")
            _draw_panel(axes, found[i], named=column == 0)
            axes.set_title("\n".join(titles[i]), fontsize=13, parse_math=False)
        top -= _BELOW
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    place = (0.5, (_FOOT - 0.1) / height)
    figure.legend(list(handles.values()), list(handles), loc="upper center", bbox_to_anchor=place, ncols=4)
    footnote(
        figure,
        "Numbers: accuracy under attack, %. Thin bars: 95 % intervals over test images. The lines are bounds for all "
        "classifiers and all mixtures, of any size, on the measured images.",
    )
    return figure


def _about(standing: Standing) -> str:
    return printable(f"{standing.run.data}, {format_ball(standing.run.norm, standing.run.eps)}")


def _draw_panel(axes: Axes, standing: Standing, named: bool) -> None:
    names = (MIXTURE, *COUNTERPARTS)
    for place, who in enumerate(names):
        at = standing.robust.get(who)
        if at is None or at.value is None:
            continue
        colour = VALUE_COLOUR if who == MIXTURE else LOSS_COLOUR
        axes.barh([place], [at.value], height=0.6, color=colour, alpha=0.45)
        if at.ends is not None:
            axes.plot(at.ends, [place, place], color=colour, marker="|", markersize=9, linewidth=1.6)
        weight = "bold" if who == MIXTURE else "normal"
        axes.text(1.03, place, text_of(at.value), transform=axes.get_yaxis_transform(), va="center", fontweight=weight)
    row = standing.ceiling
    for which, words, colour, dash in (
        ("deterministic_upper", "no classifier can exceed this", CLEAN_COLOUR, DASHES[0]),
        ("randomised_upper", "no mixture can exceed this", VALUE_COLOUR, DASHES[1]),
    ):
        value = None if row is None else getattr(row, which)
        if value is not None:
            axes.axvline(value, color=colour, linestyle=dash, label=words, clip_on=False)
    axes.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5))
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100 %"])
    axes.set_yticks(range(len(names)), names if named else [""] * len(names))
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=False, axis="y")
