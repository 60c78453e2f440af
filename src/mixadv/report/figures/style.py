"""The common style of all figures: 1400 pixels wide, the width of a README.

Figures use matplotlib's object interface on the Agg canvas instead of pyplot: no windows, and no global state of the
calling program is changed. The palette is that of Okabe and Ito (2008), for readers with colour-vision deficiencies;
line styles and markers distinguish the same curves once more.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.redaction import printable
from mixadv.report.files import writing
from mixadv.results import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLEAN_COLOUR, ROBUST_COLOUR = "#0072B2", "#D55E00"
MEMBER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
# For lines that are no members: one colour for each L or setting.
LINE_COLOURS = ("#444444", CLEAN_COLOUR, ROBUST_COLOUR, *MEMBER_COLOURS)
MARKERS = "osD^vPX*"
LOSS_COLOUR, VALUE_COLOUR = "#444444", "#882255"
DASHES: Any = ("-", (0, (6, 2)), (0, (2, 1.5)), (0, (6, 2, 1, 2)))
STYLE: Any = {
    "text.usetex": False,
    "font.family": "DejaVu Sans",
    "font.size": 13,
    "axes.titlesize": 14,
    "axes.labelsize": 13,
    "xtick.labelsize": 12,
    "ytick.labelsize": 12,
    "legend.fontsize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E3E3E3",
    "axes.axisbelow": True,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
}


def save(build: Callable[[], Figure], path: Path) -> Path:
    """Build a figure in `STYLE` and write it as png, atomically."""
    import matplotlib.text

    # Saving measures fonts, so it needs the style too.
    with matplotlib.rc_context(STYLE), writing(path) as temporary:
        figure = build()
        try:
            figure.savefig(temporary, format="png", dpi=100)
        except ValueError:
            # A text from a file is not valid mathtext.
            for text in figure.findobj(matplotlib.text.Text):
                text.set_parse_math(False)
            figure.savefig(temporary, format="png", dpi=100)
    return path


def new_figure(height: float, title: str) -> Figure:
    """An empty figure, 14 inches wide and `height` inches high (100 pixels per inch); its title is plain text."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14.0, height))
    FigureCanvasAgg(figure)
    # About 118 characters of this size fit; a longer title gets smaller ones.
    size = 16 * min(1.0, 110 / max(1, len(printable(title))))
    figure.suptitle(printable(title), fontsize=size, y=1 - 0.12 / height, parse_math=False)
    return figure


def spaced(ticks: Iterable[float], share: float) -> list[float]:
    """The ticks without those closer to the previous one than `share` of the axis: their labels would overlap."""
    at = sorted(set(ticks))
    kept: list[float] = []
    for x in at:
        if not kept or x - kept[-1] >= share * (at[-1] - at[0]):
            kept.append(float(x))
    return kept


def footnote(figure: Figure, text: str) -> None:
    """Add small text at the bottom of a figure, wrapped to its width."""
    lines = textwrap.fill(text, 155)
    figure.text(0.5, 0.1 / figure.get_figheight(), lines, ha="center", va="bottom", fontsize=11, color="#555555")


def member_style(k: int) -> dict[str, Any]:
    """Colour and line style of member k, the same in all figures."""
    return {
        "color": MEMBER_COLOURS[k % len(MEMBER_COLOURS)],
        "linestyle": DASHES[k // len(MEMBER_COLOURS) % len(DASHES)],
    }


def whisker(axes: Axes, x: float, at: Accuracy, **look: Any) -> None:
    """Draw a marker at a value, if it is known, and a bar over its interval."""
    if at.value is None:
        return
    error = None
    if at.ends is not None:
        error = [[max(at.value - at.ends[0], 0.0)], [max(at.ends[1] - at.value, 0.0)]]
    axes.errorbar([x], [at.value], yerr=error, linestyle="", **look)


def running_mean(values: np.ndarray, window: int) -> np.ndarray:
    """Centred mean over `window` values, [n] -> [n]; the window is cut at the ends."""
    if window <= 1:
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    at = np.arange(len(values))
    low = np.clip(at - window // 2, 0, None)
    high = np.clip(at - window // 2 + window, None, len(values))
    return (total[high] - total[low]) / (high - low)
