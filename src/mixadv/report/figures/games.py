"""The figures of ``task=game``, from results.json and game.npz."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.files import read_arrays
from mixadv.report.figures.points import points_figure
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    DASHES,
    MEMBER_COLOURS,
    ROBUST_COLOUR,
    VALUE_COLOUR,
    footnote,
    new_figure,
    save,
)
from mixadv.report.figures.table_of_losses import table_figure
from mixadv.report.figures.triangle import triangle_figure
from mixadv.report.files import Run, opened
from mixadv.report.game_tables import constant_risk, damage_named, read_game, runs_by_radius

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE, ATTACK = CLEAN_COLOUR, ROBUST_COLOUR, VALUE_COLOUR
MIXTURE, GREY = MEMBER_COLOURS[0], "#666666"
_LEGEND: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.12), "fontsize": 11, "handlelength": 2.6}
_LEGEND |= {"labelspacing": 0.3}
_FLOOR = 1e-7  # smaller errors are not drawn


def draw_game(run: Run | str | Path) -> Path:
    """Draw `game.png` of a run of ``task=game`` from its files.

    Raises:
        UserError: the files are missing or damaged, or the directory cannot be written.
    """
    run = opened(run)
    game = read_game(run)
    with damage_named(run.path):
        figure = FIGURES.get(game["name"], any_figure)
        arrays = read_arrays(run.path / "game.npz") or {}
        return save(lambda: figure(game, arrays), run.path / "game.png")


# --- the motivating example --------------------------------------------------------------------------------


def motivating_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """Left: points, balls, moves of the attacker and predictions on the line. Right: R(lambda) against lambda_1.

    Its axes are labelled "line" and "risk".
    """
    exact = game["exact"]
    alone = min(exact["deterministic_risks"], key=Fraction)
    pays = Fraction(exact["value"]) < Fraction(alone)
    title = "Choosing between two classifiers at random " + ("beats each of them" if pays else "gains nothing here")
    figure = new_figure(5.8, f"{title} (the attacker moves points by at most ε = {game['eps']})")
    _draw_line(figure.add_axes((0.02, 0.185, 0.555, 0.655), label="line"), game, arrays["thresholds"])
    _draw_risk(figure.add_axes((0.645, 0.245, 0.325, 0.595), label="risk"), exact, arrays["curve"])
    footnote(
        figure,
        f"The best mixture draws f1 with probability {exact['weights'][0]}, anew for every point, and is wrong with "
        f"probability {exact['value']} under attack; the better classifier alone with {alone}. The attacker does not "
        f"see the draw. It is sure of {exact['dual']} with the moves shown, and of {exact['pure_attacker']} without "
        "random moves. A constant answer, which is neither of the two, is wrong with probability "
        f"{constant_risk(game)}. All numbers are exact.",
    )
    return figure


def _draw_line(axes: Axes, game: dict[str, Any], thresholds: np.ndarray) -> None:
    eps, points = _number(game["eps"]), sorted(game["attack"], key=lambda point: Fraction(point["point"]))
    places = [_number(point["point"]) for point in points]
    reach = max(map(abs, places)) + eps + 0.25
    axes.set(xlim=(-reach, reach), ylim=(-1.66, 1.2), yticks=[])
    axes.axhline(0, color="black", linewidth=1.2, zorder=1)
    for k, (at, side) in enumerate(thresholds):
        y = -1.06 - 0.5 * k
        for low, high, label in ((-reach, at, -side), (at, reach, side)):
            colour, sign = _look(label)
            axes.fill_between([low, high], y, y + 0.38, color=colour, alpha=0.22, linewidth=0)
            x, ha = (0.01, "left") if low < at else (0.99, "right")
            words: Any = {"ha": ha, "va": "center", "color": colour, "fontweight": "bold"}
            axes.text(x, y + 0.18, f"f{k + 1} predicts {sign}", transform=axes.get_yaxis_transform(), **words)
        axes.plot([at, at], [y, 0.12], color=GREY, linestyle=DASHES[2], linewidth=1.3, zorder=0)
    for i, point in enumerate(points):
        # At different heights, because balls may overlap.
        _draw_point(axes, point, eps, -0.27 - 0.14 * i)
        words = {"ha": "center", "va": "top", "color": _look(point["label"])[0], "fontsize": 12}
        lines = "\n".join(_described(point, thresholds))
        axes.text((i + 0.5) / len(points), 0.99, lines, transform=axes.transAxes, **words)
    ticks = sorted({0.0, *places, *thresholds[:, 0]})
    axes.set_xticks(ticks, [_text(Fraction(tick)) for tick in ticks])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title("Points, how far the attacker can move them (bars), its best moves (arrows)")


def _draw_point(axes: Axes, point: dict[str, Any], eps: float, height: float) -> None:
    """A point, its ball (a bar at `height`), and an arrow for each move of the attacker."""
    x, (colour, sign) = _number(point["point"]), _look(point["label"])
    axes.plot([x - eps, x + eps], [height, height], color=colour, marker="|", markersize=9, linewidth=1.6)
    shape: Any = {"marker": "o" if sign == "+1" else "s", "s": 1000 * _number(point["mass"])}
    axes.scatter([x], [0], color=colour, zorder=3, **shape)
    for to in (_number(move["to"]) for move in point["moves"]):
        if to != x:
            arrow: Any = {"arrowstyle": "-|>", "mutation_scale": 18, "color": ATTACK, "linewidth": 2, "shrinkA": 8}
            arrow["connectionstyle"] = f"arc3,rad={0.55 if to < x else -0.55}"
            axes.annotate("", xy=(to, 0.04), xytext=(x, 0.04), arrowprops=arrow)


def _described(point: dict[str, Any], thresholds: np.ndarray) -> list[str]:
    """A point in words, then each of its moves with the classifiers that it fools."""
    lines = [f"label {_look(point['label'])[1]}, {point['mass']} of the data"]
    for move in point["moves"]:
        positive = thresholds[:, 1] * (_number(move["to"]) - thresholds[:, 0]) >= 0
        fooled = [f"f{k + 1}" for k, sign in enumerate(positive) if sign != (point["label"] > 0)]
        where = "stays" if move["to"] == point["point"] else f"to {_text(move['to'])}"
        chance = "" if move["probability"] == "1" else f" (p = {move['probability']})"
        lines.append(f"{where}, fools {' and '.join(fooled) or 'neither'}{chance}")
    return lines


def _draw_risk(axes: Axes, exact: dict[str, Any], curve: np.ndarray) -> None:
    value, dual, pure = (_number(exact[name]) for name in ("value", "dual", "pure_attacker"))
    axes.set(xlim=(0, 1), ylim=(0, 1.3 * float(curve[:, 1].max())))

    def note(text: str, x: float, y: float, offset: tuple[int, int], colour: str, ha: Any = "center") -> None:
        look: Any = {"textcoords": "offset points", "va": "bottom" if offset[1] > 0 else "top", "fontsize": 12}
        axes.annotate(text, (x, y), xytext=offset, color=colour, ha=ha, **look)

    axes.axhline(dual, color=ATTACK, linestyle=DASHES[1])
    axes.axhline(pure, color=GREY, linestyle=DASHES[2])
    axes.plot(curve[:, 0], curve[:, 1], color="black", linewidth=2.5)
    for k, (risk, ha) in enumerate(zip(exact["deterministic_risks"], ("right", "left"), strict=True)):
        axes.plot([1 - k], [_number(risk)], "s", color="black", markersize=9, clip_on=False, zorder=4)
        note(f"f{k + 1} alone: {risk}", 1 - k, _number(risk), (16 * k - 8, 9), "black", ha)
    first = _number(exact["weights"][0])
    axes.plot([first], [value], "o", color=MIXTURE, markersize=12, zorder=4)
    note(f"best mixture: {exact['value']}", first, value, (0, 30), MIXTURE)
    note(f"{exact['dual']}: what the attacker is sure of", 0.5, dual, (0, -6), ATTACK)
    if pure < dual:
        note(f"{exact['pure_attacker']}: the same without random moves", 0.5, pure, (0, -6), GREY)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
    axes.set(xlabel="probability λ1 of drawing f1 (else f2)", ylabel="error rate under attack, R(λ)")
    axes.set_title("Error rate of every mixture")


def _number(text: str) -> float:
    return float(Fraction(text))


def _text(value: Fraction | str) -> str:
    return str(value).replace("-", "−")


def _look(label: float) -> tuple[str, str]:
    """Colour and sign of a label."""
    return (POSITIVE, "+1") if label > 0 else (NEGATIVE, "−1")


# --- the Gaussians, and other games -----------------------------------------------------------------------


def any_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """The values against eps."""
    figure = new_figure(5.8, game["name"])
    _draw_values(figure.add_axes((0.3, 0.27, 0.4, 0.58), label="values"), game)
    return figure


def gaussians_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """The optimal mixture in the plane, the convergence of the solvers, and the values against eps.

    Its axes are labelled "plane", "convergence" and "values".
    """
    figure = new_figure(7.0, f"The best mixture of {game['num_classifiers']} random linear classifiers under attack")
    count, samples = game["draws"], game["num_samples"]
    _draw_plane(figure, figure.add_axes((0.035, 0.355, 0.3, 0.525), label="plane"), game, arrays)
    _draw_convergence(figure.add_axes((0.405, 0.355, 0.255, 0.525), label="convergence"), game, arrays)
    _draw_values(figure.add_axes((0.725, 0.355, 0.258, 0.525), label="values"), game)
    footnote(
        figure,
        f"{game['num_points']:,} points; the attacker moves each within ε"
        + (", anywhere." if samples is None else f", to one of {samples:,} random points: lower estimates.")
        + " Middle: how far the iterative solvers are from the exact V_rand; the entropic one minimises a smoothed "
        "risk and need only come within α log m. The best vote predicts +1 where members of more than a certain total "
        "weight do; with two classes some such vote is never worse than the mixture."
        + (f" Right: mean, minimum and maximum over {count} draws." if count > 1 else ""),
    )
    return figure


def _draw_plane(figure: Figure, axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    weights = arrays["weights"]
    left, right, low, high = extent = (-6.2, 6.2, -4.4, 4.4)
    grid = np.stack(np.meshgrid(np.linspace(left, right, 500), np.linspace(low, high, 360)), axis=-1)
    positive = (grid @ arrays["normals"].T + arrays["offsets"] >= 0) @ weights
    colours = LinearSegmentedColormap.from_list("decision", ["#F3B98F", "#FFFFFF", "#9CC8E6"])
    image = axes.imshow(positive, extent=extent, origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto", zorder=0)
    for label, marker in ((1, "o"), (-1, "x")):
        colour, sign = _look(label)
        x, y = arrays["points"][arrays["labels"] == label].T
        look: dict[str, Any] = {"markersize": 3.5, "markeredgewidth": 0.8, "alpha": 0.55}
        axes.plot(x, y, marker, color=colour, label=f"label {sign}", **look)
    for normal, offset, weight in zip(arrays["normals"], arrays["offsets"], weights, strict=True):
        ends = -offset * normal + 20 * np.outer([-1, 1], [-normal[1], normal[0]])
        look = {"color": "#888888", "alpha": 0.45, "linewidth": 0.8, "linestyle": DASHES[2]}
        if weight > 1e-6:
            look = {"color": "black", "alpha": 0.35 + 0.65 * weight, "linewidth": 1.2 + 3.0 * weight}
        axes.plot(*ends.T, **look)
    axes.set(xlim=(left, right), ylim=(low, high), title=f"Best mixture at ε = {game['show_eps']:g}, first draw")
    axes.grid(visible=False)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=2, markerscale=2, fontsize=11, columnspacing=1)
    bar = figure.colorbar(
        image, cax=figure.add_axes((0.075, 0.225, 0.22, 0.022), label="bar"), orientation="horizontal"
    )
    bar.ax.tick_params(labelsize=11)
    bar.ax.grid(visible=False)
    bar.set_label("probability of predicting +1\n(lines: classifiers; thicker means more weight)", fontsize=11)


def _draw_convergence(axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    oracle, entropic = (_drawn(arrays[name]) for name in ("oracle_errors", "value_errors"))
    axes.plot(arrays["oracle_steps"], oracle, color="black", marker="o", markersize=5, label="Algorithm 1")
    at = np.arange(1, entropic.shape[1])
    for k, alpha in enumerate(arrays["alphas"]):
        axes.plot(at, entropic[k, 1:], color=MEMBER_COLOURS[k % len(MEMBER_COLOURS)], label=f"entropic, α = {alpha:g}")
    top = float(np.nanmax([*oracle, *entropic.ravel(), 10 * _FLOOR]))
    low = float(np.nanmin([*oracle, *entropic.ravel(), top / 100]))
    end = max(len(at), 2)
    axes.plot([1, end], [3 * top, 3 * top * end**-0.5], color="#999999", linestyle=DASHES[1], zorder=0)
    axes.text(1.2, 3.6 * top, "$T^{-1/2}$", color=GREY, fontsize=13)
    axes.set(xscale="log", yscale="log", xlim=(1, end), ylim=(low / 3, 8 * top))
    axes.set_xlabel("steps T", labelpad=1)
    axes.set_ylabel("R(best weights so far) − V_rand")
    axes.set_title(f"Solvers at ε = {game['convergence']['eps']:g}, first draw")
    axes.legend(ncols=-(-(1 + len(arrays["alphas"])) // 4), **_LEGEND)


def _drawn(errors: np.ndarray) -> np.ndarray:
    """The errors, nan where they are below the accuracy of the linear program."""
    return np.where(errors > _FLOOR, errors, np.nan)


def _draw_values(axes: Axes, game: dict[str, Any]) -> None:
    by_radius = runs_by_radius(game)
    eps = list(by_radius)
    for name, label, look in (
        ("v_det", "V_det, best member alone", {"color": VALUE_COLOUR, "marker": "s"}),
        ("v_rand", "V_rand, best mixture of the members", {"color": MIXTURE, "marker": "o"}),
        ("dual", "D, what the attacker is sure of", {"color": "black", "linestyle": DASHES[2], "linewidth": 1.8}),
        ("best_vote", "best vote of the members", {"color": CLEAN_COLOUR, "marker": "^", "linestyle": DASHES[1]}),
        ("best_constant", "best constant answer", {"color": ROBUST_COLOUR, "linestyle": DASHES[3]}),
    ):
        if not all(name in run for runs in by_radius.values() for run in runs):
            continue
        values = np.array([[run[name] for run in runs] for runs in by_radius.values()])
        axes.plot(eps, values.mean(1), markersize=5, label=label, **look)
        if name in ("v_det", "v_rand"):
            axes.fill_between(eps, values.min(1), values.max(1), color=look["color"], alpha=0.22, linewidth=0)
    axes.set(ylim=(0, 1), ylabel="error rate under attack", title="What each can reach")
    axes.margins(x=0.03)
    axes.set_xlabel("ε, how far the attacker can move a point", labelpad=1)
    axes.legend(**_LEGEND)


# By the name of the game.
FIGURES = {
    "motivating": motivating_figure,
    "gaussians": gaussians_figure,
    "triangle": triangle_figure,
    "table": table_figure,
    "points": lambda game, arrays: points_figure(game, arrays, _draw_values),
}
