"""The figure of ``game=triangle``: what two classifiers answer in the overlaps, and what each classifier reaches."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    LOSS_COLOUR,
    MEMBER_COLOURS,
    ROBUST_COLOUR,
    VALUE_COLOUR,
    footnote,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = (CLEAN_COLOUR, ROBUST_COLOUR, MEMBER_COLOURS[0])


def triangle_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """Left and middle: the plane as f1 and f2 see it, with the moves that fool them. Right: accuracies.

    Its axes are labelled "f1", "f2" and "accuracy".
    """
    exact, cycles = game["exact"], len(game["regions"]) == 3
    mixed, alone = (1 - Fraction(exact["value"]), 1 - min(map(Fraction, exact["deterministic_risks"])))
    title = "Randomising beats every deterministic classifier" if mixed > alone else "Randomising gains nothing here"
    figure = new_figure(6.2, f"{title}: three classes, ε = {game['eps']} of their distance")
    shown = game["classifiers"][:2] if cycles else [game["classifiers"][_best(exact)]] * 2
    for k, answers in enumerate(shown):
        axes = figure.add_axes((0.02 + 0.32 * k, 0.13, 0.3, 0.74), label=f"f{k + 1}")
        _draw_plane(axes, game, arrays["points"], answers)
        right = 1 - Fraction(exact["deterministic_risks"][k if cycles else _best(exact)])
        axes.set_title(f"f{k + 1}: accuracy under attack {right}")
    _draw_accuracies(figure.add_axes((0.7, 0.235, 0.29, 0.62), label="accuracy"), game, mixed, alone)
    footnote(
        figure,
        "Discs: where the attacker can move the point of each class. Colours: the answer of a classifier. Arrows: "
        "moves that fool it. A classifier answers one class in a region that balls share, and only these matter, so "
        "the best of all classifiers is known exactly. All numbers are exact; error rates (risks) are 1 − accuracy.",
    )
    return figure


def _best(exact: dict[str, Any]) -> int:
    risks = list(map(Fraction, exact["deterministic_risks"]))
    return risks.index(min(risks))


def _draw_plane(axes: Axes, game: dict[str, Any], points: np.ndarray, answers: list[int]) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Circle

    eps = float(Fraction(game["eps"]))
    reach = 0.65 + eps
    side = np.linspace(-reach, reach, 700)
    grid = np.stack(np.meshgrid(side, side), axis=-1)
    inside = np.stack([np.hypot(*(grid - point).transpose(2, 0, 1)) <= eps for point in points], axis=-1)
    image = np.ones((*inside.shape[:2], 3))
    regions = [[label] for label in range(len(points))] + game["regions"]
    for region, answer in zip(regions, [*range(len(points)), *answers], strict=True):
        here = (inside == np.isin(range(len(points)), region)).all(-1)
        strength = 0.25 if len(region) == 1 else 0.75
        image[here] = 1 - strength * (1 - np.array(to_rgb(CLASS_COLOURS[answer])))
    axes.imshow(image, extent=(-reach, reach, -reach, reach), origin="lower", interpolation="nearest")
    for label, (point, colour) in enumerate(zip(points, CLASS_COLOURS, strict=True)):
        axes.add_patch(Circle(tuple(point), eps, fill=False, color=colour, linewidth=1.4))
        axes.plot(*point, "o", color=colour, markersize=9, zorder=3)
        words: Any = {"ha": "center", "va": "center", "color": colour, "fontweight": "bold", "fontsize": 13}
        x, y = point * (1 + 0.25 / np.hypot(*point))
        axes.text(x, y, f"class {label + 1}", **words)
        wrong = next((r for r, a in zip(game["regions"], answers, strict=True) if label in r and a != label), None)
        if wrong is not None:
            shape: Any = {"arrowstyle": "-|>", "mutation_scale": 18, "color": "black", "linewidth": 1.8, "shrinkA": 6}
            axes.annotate("", xy=tuple(points[wrong].mean(0)), xytext=tuple(point), arrowprops=shape, zorder=4)
    axes.axis("off")


def _draw_accuracies(axes: Axes, game: dict[str, Any], mixed: Fraction, alone: Fraction) -> None:
    bars = [("the best\ndeterministic\nclassifier", alone, LOSS_COLOUR), ("the best\nmixture", mixed, VALUE_COLOUR)]
    if len(game["regions"]) == 3:
        first, second = (1 - Fraction(risk) for risk in game["exact"]["deterministic_risks"][:2])
        bars = [("f1 alone", first, LOSS_COLOUR), ("f2 alone", second, LOSS_COLOUR), *bars]
        bars[-1] = ("f1 or f2\nby a fair\ncoin", mixed, VALUE_COLOUR)
    for k, (_, value, colour) in enumerate(bars):
        axes.bar([k], [float(value)], color=colour, width=0.65)
        axes.text(k, float(value) + 0.02, str(value), ha="center", va="bottom", fontsize=14)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars], fontsize=10)
    axes.set(ylim=(0, 1.1), xlim=(-0.6, len(bars) - 0.4), ylabel="accuracy under attack")
    axes.set_title("What each can reach")
    axes.grid(visible=False, axis="x")
