"""The figures of the built-in games, from results.json and game.npz."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.errors import UserError
from mixadv.report.figures.style import CLEAN, DASHES, MEMBERS, ROBUST, VALUE, footnote, new_figure, save
from mixadv.report.files import read_run
from mixadv.report.game_tables import ANEW, DAMAGED, read_game

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POSITIVE, NEGATIVE, ATTACK = CLEAN, ROBUST, VALUE
MIXTURE, GREY = MEMBERS[0], "#666666"
_LEGEND: Any = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.14), "fontsize": 11, "handlelength": 2.6}
_FLOOR = 1e-5  # of the errors that are drawn


def draw_game(run_dir: str | Path) -> Path:
    """Draw `game.png` of a run of ``task=game`` from its files.

    Raises:
        UserError: the files are missing or damaged, or the directory cannot be written.
    """
    path = Path(run_dir)
    game = read_game(read_run(path))
    try:
        with open(path / "game.npz", "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except Exception as error:  # zipfile, zlib and numpy raise half a dozen unrelated types here
        raise UserError(f"{path / 'game.npz'} cannot be read: {error}; run the game again with resume=never") from error
    figure = motivating_figure if game["name"] == "motivating" else gaussians_figure
    try:
        return save(lambda: figure(game, arrays), path / "game.png")
    except DAMAGED as error:
        raise UserError(f"the results of the game in {path} are damaged ({type(error).__name__}): {ANEW}") from error


# --- the motivating example --------------------------------------------------------------------------------


def motivating_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """The line with its atoms, balls, decision regions and the attack; beside it the risk against lam_1.

    Its axes are labelled "line" and "risk".
    """
    figure = new_figure(5.6, f"Two classifiers on the line, ε = {game['eps']}")
    exact = game["exact"]
    _draw_line(figure.add_axes((0.02, 0.185, 0.555, 0.655), label="line"), game, arrays["thresholds"])
    _draw_risk(figure.add_axes((0.645, 0.245, 0.325, 0.595), label="risk"), exact, arrays["curve"])
    footnote(
        figure,
        f"The mixture ({', '.join(exact['weights'])}) has risk {exact['value']}; the better classifier alone has "
        f"{min(exact['deterministic_risks'], key=Fraction)}. The attacker is sure of {exact['dual']} with the moves "
        f"drawn, and of {exact['pure_attacker']} with moves that are not random. All numbers are exact.",
    )
    return figure


def _draw_line(axes: Axes, game: dict[str, Any], thresholds: np.ndarray) -> None:
    eps = float(Fraction(game["eps"]))
    places = [float(Fraction(point["point"])) for point in game["attack"]]
    reach = max(map(abs, places)) + eps + 0.25
    axes.set(xlim=(-reach, reach), ylim=(-1.66, 1.42))
    axes.axhline(0, color="black", linewidth=1.2, zorder=1)
    for k, (at, side) in enumerate(thresholds):
        y = -1.06 - 0.5 * k
        for low, high, label, outer in ((-reach, at, -side, "left"), (at, reach, side, "right")):
            colour = POSITIVE if label > 0 else NEGATIVE
            axes.fill_between([low, high], y, y + 0.38, color=colour, alpha=0.22, linewidth=0)
            x = low + 0.08 if outer == "left" else high - 0.08
            words = f"f{k + 1} says {'+1' if label > 0 else '−1'}"
            axes.text(x, y + 0.18, words, ha=outer, va="center", color=colour, fontweight="bold")
        axes.plot([at, at], [y, 0.12], color=GREY, linestyle=DASHES[2], linewidth=1.3, zorder=0)
    for i, (point, x) in enumerate(zip(game["attack"], places, strict=True)):
        colour = POSITIVE if point["label"] > 0 else NEGATIVE
        if eps > 0:
            # Neighbouring balls may overlap: each has a height of its own.
            y = -0.27 - 0.14 * i
            ends = "|-|,widthA=0.3,widthB=0.3"
            look = {"arrowstyle": ends, "color": colour, "shrinkA": 0, "shrinkB": 0, "linewidth": 1.6}
            axes.annotate("", xy=(x - eps, y), xytext=(x + eps, y), arrowprops=look)
        size = 1000 * float(Fraction(point["mass"]))
        shape = "o" if point["label"] > 0 else "s"
        axes.scatter([x], [0], s=size, color=colour, marker=shape, zorder=3, edgecolors="white", linewidths=1.5)
        sign = "+1" if point["label"] > 0 else "−1"
        about = f"label {sign}, mass {point['mass']}"
        axes.text(x, 1.36, about, ha="center", va="top", fontsize=12, color=colour)
        _draw_moves(axes, point, x)
    ticks = sorted({Fraction(0), *(Fraction(p["point"]) for p in game["attack"]), *map(Fraction, thresholds[:, 0])})
    axes.set_xticks([float(tick) for tick in ticks], [_text(tick) for tick in ticks])
    axes.set_yticks([])
    axes.grid(visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_title("Points and their balls, decisions, and the attacker's optimal moves")


def _draw_moves(axes: Axes, point: dict[str, Any], x: float) -> None:
    """Arcs from the point to where the attacker sends it, with probabilities."""
    for move in point["moves"]:
        to, chance = float(Fraction(move["to"])), Fraction(move["probability"])
        if to == x:
            text = "stays" if chance == 1 else f"stays with\nprobability {chance}"
            axes.text(x, 0.24, text, ha="center", va="bottom", color=ATTACK, fontsize=12)
            continue
        sign = 1 if to > x else -1
        look = {"arrowstyle": "-|>", "mutation_scale": 18, "color": ATTACK, "linewidth": 2, "shrinkA": 0, "shrinkB": 2}
        look["connectionstyle"] = f"arc3,rad={-0.55 * sign}"
        axes.annotate("", xy=(to, 0.04), xytext=(x + 0.03 * sign, 0.2), arrowprops=look)
        text = f"to {_text(Fraction(move['to']))}" + ("" if chance == 1 else f"\nwith probability {chance}")
        # The words of two moves from one point stand on either side of it, those of a single one behind it.
        if len(point["moves"]) == 1:
            axes.text(x + 0.1 * sign, 0.3, text, ha="right" if sign > 0 else "left", color=ATTACK, fontsize=12)
        else:
            axes.text(x + 0.45 * sign, 0.52, text, ha="center", va="bottom", color=ATTACK, fontsize=12)


def _draw_risk(axes: Axes, exact: dict[str, Any], curve: np.ndarray) -> None:
    first, value, dual, pure = (
        float(Fraction(text)) for text in (exact["weights"][0], exact["value"], exact["dual"], exact["pure_attacker"])
    )
    top = float(curve[:, 1].max())
    axes.set(xlim=(0, 1), ylim=(0, 1.3 * top))

    def say(text: str, x: float, y: float, offset: tuple[int, int], colour: str, ha: Any = "center") -> None:
        va: Any = "bottom" if offset[1] > 0 else "top"
        axes.annotate(text, (x, y), xytext=offset, textcoords="offset points", color=colour, fontsize=12, ha=ha, va=va)

    axes.axhline(dual, color=ATTACK, linestyle=DASHES[1])
    axes.axhline(pure, color=GREY, linestyle=DASHES[2])
    axes.plot(curve[:, 0], curve[:, 1], color="black", linewidth=2.5)
    for k, ha in ((0, "right"), (1, "left")):
        alone = exact["deterministic_risks"][k]
        height = float(Fraction(alone))
        axes.plot([1 - k], [height], "s", color="black", markersize=9, clip_on=False, zorder=4)
        say(f"f{k + 1} alone: {alone}", 1 - k, height, (8 if k else -8, 9), "black", ha)
    axes.plot([first], [value], "o", color=MIXTURE, markersize=12, zorder=4)
    say(f"best mixture: {exact['value']}", first, value, (0, 30), MIXTURE)
    if pure == dual:
        say(f"D = {exact['dual']}, the attacker's guarantee, random or not", 0.5, dual, (0, -6), ATTACK)
    else:
        say(f"D = {exact['dual']}, the attacker's guarantee", 0.5, dual, (0, -6), ATTACK)
        say(f"{exact['pure_attacker']}, its guarantee without randomness", 0.5, pure, (0, -6), GREY)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "1/4", "1/2", "3/4", "1"])
    axes.set(xlabel="weight λ1 of f1 (f2 has 1 − λ1)", ylabel="adversarial risk R(λ)", title="Risk of their mixtures")


def _text(value: Fraction) -> str:
    return str(value).replace("-", "−")


# --- the Gaussians -----------------------------------------------------------------------------------------


def gaussians_figure(game: dict[str, Any], arrays: dict[str, np.ndarray]) -> Figure:
    """The plane with the optimal mixture, convergence of the solvers, and the values against eps.

    Its axes are labelled "plane", "convergence" and "values".
    """
    figure = new_figure(6.6, f"{game['num_classifiers']} random linear classifiers on three Gaussians")
    count = len(game["seeds"])
    _draw_plane(figure, figure.add_axes((0.035, 0.335, 0.3, 0.535), label="plane"), game, arrays)
    _draw_convergence(figure.add_axes((0.405, 0.335, 0.255, 0.535), label="convergence"), game, arrays)
    _draw_values(figure.add_axes((0.725, 0.335, 0.258, 0.535), label="values"), game, arrays)
    found = game["convergence"]
    footnote(
        figure,
        f"{game['num_points']:,} points; the attacker chooses among the point and {game['candidates_per_point'] - 1:,} "
        f"uniform points of its ball ({found['candidates_per_point'] - 1:,} in the middle), so values are lower "
        "estimates of those on whole balls. Middle, solid: R at the best weights so far minus V of the linear program; "
        "the entropic solver minimises F, so R need only come within α log m of V. Dotted: F minus min F, where known"
        + (f". Right: mean, minimum and maximum over {count} seeds." if count > 1 else "."),
    )
    return figure


def _draw_plane(figure: Figure, axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    points, positive, weights = arrays["points"], arrays["labels"] > 0, arrays["weights"]
    extent = (-6.2, 6.2, -4.4, 4.4)
    x, y = np.meshgrid(np.linspace(extent[0], extent[1], 500), np.linspace(extent[2], extent[3], 360))
    grid = np.stack([x, y], axis=-1)
    said = (grid @ arrays["normals"].T + arrays["offsets"] >= 0) @ weights
    colours = LinearSegmentedColormap.from_list("decision", ["#F3B98F", "#FFFFFF", "#9CC8E6"])
    image = axes.imshow(said, extent=extent, origin="lower", cmap=colours, vmin=0, vmax=1, aspect="auto", zorder=0)
    for mask, colour, marker, label in ((positive, POSITIVE, "o", "Y = +1"), (~positive, NEGATIVE, "x", "Y = −1")):
        face: dict[str, Any] = {"edgecolors": "none"} if marker == "o" else {}
        x, y = points[mask].T
        axes.scatter(x, y, s=11, c=colour, marker=marker, alpha=0.55, linewidths=0.8, label=label, **face)
    span = np.array([-20.0, 20.0])
    for normal, offset, weight in zip(arrays["normals"], arrays["offsets"], weights, strict=True):
        along = np.array([-normal[1], normal[0]])
        ends = -offset * normal + span[:, None] * along
        look: dict[str, Any] = {"color": "#888888", "alpha": 0.45, "linewidth": 0.8, "linestyle": DASHES[2]}
        if (used := float(weight)) > 1e-6:
            look = {"color": "black", "alpha": 0.35 + 0.65 * used, "linewidth": 1.2 + 3.0 * used}
        axes.plot(*ends.T, **look)
    axes.set(xlim=(extent[0], extent[1]), ylim=(extent[2], extent[3]))
    axes.grid(visible=False)
    axes.set_xlabel("x1")
    axes.set_ylabel("x2", labelpad=-4)
    axes.set_title(f"Optimal mixture at ε = {game['show_eps']:g}, seed {game['seeds'][0]}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, markerscale=2, fontsize=11, columnspacing=1)
    bar = figure.colorbar(
        image, cax=figure.add_axes((0.075, 0.185, 0.22, 0.022), label="bar"), orientation="horizontal"
    )
    bar.ax.tick_params(labelsize=11)
    bar.ax.grid(visible=False)
    bar.set_label("probability that it says +1 (lines: classifiers, by weight)", fontsize=11)


def _draw_convergence(axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    steps, errors = arrays["oracle_steps"], _above(arrays["oracle_errors"])
    axes.plot(steps, errors, color="black", marker="o", markersize=5, label="Algorithm 1")
    total = arrays["value_errors"].shape[1] - 1
    at = np.arange(1, total + 1)
    values = _above(arrays["value_errors"][:, 1:])
    for k, alpha in enumerate(arrays["alphas"]):
        look: dict[str, Any] = {"color": MEMBERS[k % 4], "linestyle": DASHES[k // 4 % len(DASHES)]}
        axes.plot(at, values[k], label=f"entropic, α = {alpha:g}", **look)
        # Below this the least F is not known well enough to be subtracted.
        smoothed = _above(arrays["smoothed_errors"][k, 1:], 10 * arrays["certificates"][k])
        axes.plot(at, smoothed, color=MEMBERS[k % 4], linestyle=":", linewidth=1.6)
    top = float(np.nanmax([*errors, *values.ravel(), 10 * _FLOOR], initial=10 * _FLOOR))
    # Along the upper edge of the data and down from its middle, so that no line runs through the words.
    end = float(max(total, 2))
    guides = ((-0.5, 2.2 * top, 1.0, end, 1.2), (-2.0, 2.2 * top / np.sqrt(end / 12), end / 12, end, 3.0))
    for power, height, start, stop, place in guides:
        x = np.array([start, stop])
        axes.plot(x, height * (x / start) ** power, color="#999999", linewidth=1.3, linestyle=DASHES[1], zorder=0)
        label = "$T^{-1/2}$" if power > -1 else "$T^{-2}$"
        axes.text(start * place, 1.25 * height * place**power, label, color=GREY, fontsize=13, ha="left", va="bottom")
    axes.set(xscale="log", yscale="log", ylim=(_FLOOR, 8 * top), xlim=(1, end))
    axes.set_xlabel("steps T", labelpad=1)
    axes.set(ylabel="error", title=f"Convergence at ε = {game['convergence']['eps']:g}, seed {game['seeds'][0]}")
    axes.legend(ncols=-(-(1 + len(arrays["alphas"])) // 4), **_LEGEND)


def _above(errors: np.ndarray, floor: float = 0.0) -> np.ndarray:
    """The errors, nan where a logarithmic axis cannot or should not show them."""
    return np.where(errors > max(floor, _FLOOR / 100), errors, np.nan)


def _draw_values(axes: Axes, game: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    eps = arrays["eps"]
    for name, label, look in (
        ("v_det", "V_det, best classifier alone", {"color": VALUE, "marker": "s"}),
        ("v_rand", "V_rand, optimal mixture", {"color": MIXTURE, "marker": "o"}),
        ("dual", "D, the attacker's guarantee", {"color": "black", "linestyle": DASHES[2], "linewidth": 1.8}),
    ):
        values = arrays[name]
        axes.plot(eps, values.mean(0), markersize=5, label=label, **look)
        if len(values) > 1 and name != "dual":
            axes.fill_between(eps, values.min(0), values.max(0), color=look["color"], alpha=0.22, linewidth=0)
    axes.set_ylim(0, 1)
    margin = 0.03 * float(eps[-1] - eps[0]) or 0.5
    axes.set_xlim(float(eps[0]) - margin, float(eps[-1]) + margin)
    axes.set_xlabel("ε, radius of the ℓ2 ball", labelpad=1)
    axes.set(ylabel="adversarial risk", title="Values of the game")
    axes.legend(**_LEGEND)
