"""The figure of ``game=table``: weights, losses at the attacker's moves, and how often it makes them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.redaction import printable
from mixadv.report.figures.style import MEMBER_COLOURS, ROBUST_COLOUR, VALUE_COLOUR, footnote, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More rows or columns than this have no numbers in their cells, and shorter labels.
_LEGIBLE = 12


def table_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """Middle: the losses, a row per move and a column per member. Above: weights. Right: the attacker. Left: values.

    Its axes are labelled "values", "weights", "losses" and "attack".
    """
    (run,), moves = game["runs"], game["moves"]
    losses = np.array([move["losses"] for move in moves], dtype=float)
    weights, chances = np.array(run["weights"]), np.array([move["probability"] for move in moves])
    columns = np.sort(np.argsort(-weights, kind="stable")[: 2 * _LEGIBLE])
    losses, members = losses[:, columns], [printable(game["members"][k])[:12] for k in columns]
    height = max(6.0, 3.4 + 0.24 * len(moves))
    figure = new_figure(height, printable(f"The game in {game['file']}"))
    bottom, top = 1.25 / height, 1 - 2.1 / height
    _draw_values(figure.add_axes((0.07, bottom, 0.22, 1 - 1.95 / height), label="values"), game)
    middle = figure.add_axes((0.42, bottom, 0.36, top - bottom), label="losses")
    image = middle.imshow(losses, aspect="auto", cmap="Oranges", interpolation="nearest")
    if len(moves) <= _LEGIBLE and len(columns) <= _LEGIBLE:
        dark = losses.min() + 0.6 * np.ptp(losses)
        for (j, k), loss in np.ndenumerate(losses):
            middle.text(k, j, f"{loss:.4g}", ha="center", va="center", color="white" if loss > dark else "black")
    else:
        bar = figure.colorbar(image, cax=figure.add_axes((0.79, bottom, 0.008, top - bottom), label="bar"))
        bar.ax.tick_params(labelsize=9)
    one = game["examples"] == 1
    middle.set_yticks(
        range(len(moves)),
        [f"move {move['move']}" if one else f"example {move['example']}, move {move['move']}" for move in moves],
        fontsize=10,
    )
    middle.set_xticks(range(len(columns)), members, rotation=0 if len(columns) <= 6 else 60, fontsize=11)
    middle.grid(visible=False)
    middle.set_xlabel("losses of the members (darker is larger)")
    above = figure.add_axes((0.42, top + 0.12 / height, 0.36, 1.05 / height), label="weights", sharex=middle)
    above.bar(range(len(columns)), weights[columns], color=MEMBER_COLOURS[0])
    for k, weight in enumerate(weights[columns]):
        if weight > 1e-9 and len(columns) <= _LEGIBLE:
            above.text(k, weight, f"{weight:.3g}", ha="center", va="bottom", fontsize=11)
    above.tick_params(labelbottom=False)
    above.set(ylim=(0, 1.3 * weights.max()), title="weights of the best mixture")
    beside = figure.add_axes((0.83, bottom, 0.14, top - bottom), label="attack", sharey=middle)
    beside.barh(range(len(moves)), chances, color=ROBUST_COLOUR)
    beside.tick_params(labelleft=False)
    beside.set_title("probability\nof each move")
    shown = "All moves." if one and len(moves) == game["perturbations"] else "Moves with the largest probabilities."
    footnote(
        figure,
        f"{shown} The attacker plays {game['played_moves']:,} moves of {game['examples']:,} × "
        f"{game['perturbations']:,}. Together the strategies are a Nash equilibrium, duality gap {run['gap']:.1e}.",
    )
    return figure


def _draw_values(axes: Any, game: dict[str, Any]) -> None:
    (run,) = game["runs"]
    bars = {"worst member alone": max(game["deterministic_risks"]), "best member alone, V_det": run["v_det"]}
    bars |= {"best mixture, V_rand": run["v_rand"], "attacker is sure of, D": run["dual"]}
    colours = ("#BBBBBB", "#777777", MEMBER_COLOURS[0], VALUE_COLOUR)
    axes.barh(range(len(bars)), list(bars.values()), height=0.5, color=colours)
    low, high = min(0.0, *bars.values()), max(0.0, *bars.values())
    for k, (name, value) in enumerate(bars.items()):
        axes.text(low, k - 0.28, f"{name}: {value:.4g}", ha="left", va="bottom", fontsize=11)
    axes.set(
        ylim=(len(bars) - 0.4, -0.8), yticks=[], xlim=(low, high + 0.05 * (high - low or 1)), title="expected loss"
    )
    axes.grid(visible=False, axis="y")
