"""The figure of ``game=points``: the mixture in the plane, its weights, and the values against eps."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.redaction import printable
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    LOSS_COLOUR,
    MARKERS,
    MEMBER_COLOURS,
    ROBUST_COLOUR,
    footnote,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = (ROBUST_COLOUR, CLEAN_COLOUR, *MEMBER_COLOURS)
# Balls and moves are drawn for at most so many points, members for at most so many.
FEW, MOST_MEMBERS = 40, 16


def points_figure(game: dict[str, Any], arrays: dict[str, np.ndarray], draw_values: Any) -> Figure:
    """Its axes are labelled "plane", "members" and "values"; `draw_values` draws the last one."""
    figure = new_figure(7.0, printable(f"The game on the points of {game['file']}"))
    _draw_plane(figure.add_axes((0.055, 0.2, 0.33, 0.68), label="plane"), game, arrays)
    _draw_members(figure.add_axes((0.5, 0.355, 0.16, 0.525), label="members"), game)
    draw_values(figure.add_axes((0.725, 0.355, 0.258, 0.525), label="values"), game)
    samples = game["num_samples"]
    footnote(
        figure,
        f"{game['num_points']:,} points; the attacker moves each within ε ({game['norm']})"
        + (", anywhere. " if samples is None else f", to one of {samples:,} random points: lower estimates. ")
        + "Left: the deeper the colour, the more probable the answer of the best mixture"
        + ("; arrows: moves of the attacker." if len(arrays["points"]) <= FEW else ".")
        + f" Middle: weights and risks alone at ε = {game['show_eps']:g}.",
    )
    return figure


def _draw_plane(axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Circle, Rectangle

    palette = [np.array(to_rgb(CLASS_COLOURS[c % len(CLASS_COLOURS)])) for c in range(len(game["labels"]))]
    image = 1 - 0.45 * np.einsum("hwc,cd->hwd", arrays["shares"], 1 - np.stack(palette))
    left, right, low, high = arrays["extent"]
    axes.imshow(image.clip(0, 1), extent=(left, right, low, high), origin="lower", interpolation="nearest")
    eps, few = game["show_eps"], len(arrays["points"]) <= FEW
    for c, label in enumerate(game["labels"]):
        mine = arrays["points"][arrays["labels"] == label]
        look: dict[str, Any] = {"markersize": 7 if few else 3.5, "alpha": 1.0 if few else 0.7}
        axes.plot(*mine.T, MARKERS[c % len(MARKERS)], color=palette[c], label=f"label {label}", **look)
        for x, y in mine if few else ():
            shape: Any = {"fill": False, "color": palette[c], "linewidth": 1.1, "alpha": 0.8}
            square = Rectangle((x - eps, y - eps), 2 * eps, 2 * eps, **shape)
            axes.add_patch(square if game["norm"] == "linf" else Circle((x, y), eps, **shape))
    for x, y, to_x, to_y in arrays["moves"] if few else ():
        arrow: Any = {"arrowstyle": "-|>", "mutation_scale": 13, "color": "black", "linewidth": 1.2}
        axes.annotate("", xy=(to_x, to_y), xytext=(x, y), arrowprops=arrow)
    axes.set(xlim=(left, right), ylim=(low, high), title=f"Best mixture at ε = {eps:g}")
    axes.set_anchor("N")
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.07), ncols=4, fontsize=11, markerscale=1.2)


def _draw_members(axes: Axes, game: dict[str, Any]) -> None:
    weights, risks = np.array(game["weights"]), np.array(game["deterministic_risks"])
    shown = np.sort(np.lexsort((risks, -weights))[:MOST_MEMBERS])
    at = np.arange(len(shown))
    axes.barh(at - 0.2, weights[shown], height=0.38, color=MEMBER_COLOURS[0], label="weight in the best mixture")
    axes.barh(at + 0.2, risks[shown], height=0.38, color=LOSS_COLOUR, label="error rate alone")
    names = [printable(game["members"][k]) for k in shown]
    axes.set_yticks(at, [name if len(name) <= 18 else f"…{name[-17:]}" for name in names], fontsize=10)
    axes.set(xlim=(0, 1), ylim=(len(shown) - 0.4, -0.6), title="Members")
    axes.grid(visible=False, axis="y")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), fontsize=11)
