"""The figure of regions.npz: what members and mixture answer in the plane, and where attacks move a point."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mixadv import records
from mixadv.errors import UserError
from mixadv.files import read_arrays
from mixadv.redaction import printable
from mixadv.report.cells import text_of
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    MARKERS,
    MEMBER_COLOURS,
    ROBUST_COLOUR,
    footnote,
    new_figure,
    save,
)
from mixadv.report.files import Run, opened
from mixadv.report.tables import headline
from mixadv.results import Accuracy

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLOURS = (CLEAN_COLOUR, ROBUST_COLOUR, *MEMBER_COLOURS)
# Members that are drawn, those of the largest weight.
MOST_MEMBERS = 3
_TOP, _BELOW, _WIDEST, _GAP = 0.95, 1.45, 4.3, 0.35  # inches


class Regions(NamedTuple):
    """The content of regions.npz.

    Attributes:
        answers: [L, G, G], the class that a member answers in each cell of the unit square, row by row from the bottom;
            -1: none.
        points, labels: the measured images [N, 2] and their classes [N].
        shown: [S], one image of each class.
        worst: [S, 2], their worst points.
        class_names: of the classes.
    """

    answers: np.ndarray
    points: np.ndarray
    labels: np.ndarray
    shown: np.ndarray
    worst: np.ndarray
    class_names: list[str]


def read_regions(run: Run) -> Regions | None:
    """The content of `regions.npz`; None if it does not exist.

    Raises:
        ValueError: the file is damaged, or its arrays fit neither one another nor the results.
    """
    path = run.path / records.REGIONS
    arrays = read_arrays(path)
    if arrays is None:
        return None
    if missing := [name for name in Regions._fields if name not in arrays]:
        raise ValueError(f"{path} has no {missing[0]!r}")
    named = [printable(str(name)) for name in arrays[records.CLASS_NAMES]]
    found = Regions(
        **{name: arrays[name] for name in Regions._fields if name != records.CLASS_NAMES}, class_names=named
    )
    answers, count, classes = found.answers, len(found.points), len(named)
    fits = (
        answers.ndim == 3
        and answers.shape[0] == len(run.results.weights)
        and answers.shape[1] == answers.shape[2]
        and found.points.shape == (count, 2)
        and found.labels.shape == (count,)
        and found.worst.shape == (len(found.shown), 2)
        and all(array.dtype.kind in "iu" for array in (answers, found.labels, found.shown))
        and answers.max(initial=0) < classes
        and set(found.labels.tolist()) <= set(range(classes))
        and set(found.shown.tolist()) <= set(range(count))
    )
    if not fits:
        raise ValueError(f"{path} does not match the results.json beside it")
    return found


def draw_regions(run: Run | str | Path) -> Path | None:
    """Draw `regions.png` of a run on data in the plane; None without a `regions.npz`.

    Raises:
        UserError: `regions.npz` is damaged, or the directory cannot be written.
    """
    run = opened(run)
    try:
        regions = read_regions(run)
    except ValueError as error:
        raise UserError(f"{error}: run the command again with resume=never") from error
    if regions is None:
        return None
    return save(lambda: regions_figure(run, regions), run.path / "regions.png")


def regions_figure(run: Run, regions: Regions) -> Figure:
    """The unit square as members and mixture see it; the axes are labelled "member k" and "mixture" ("model" if L = 1).

    A colour is that of the answer; for the mixture the colours of the classes are mixed by their probabilities.
    """
    weights = np.asarray(run.results.weights)
    kept = np.sort(np.argsort(-weights, kind="stable")[:MOST_MEMBERS]) if len(weights) > 1 else np.array([], int)
    names = [*(f"member {k}" for k in kept), "mixture" if len(weights) > 1 else "model"]
    side = min(_WIDEST, (13.0 - (len(names) - 1) * _GAP) / len(names))
    height = _TOP + side + _BELOW
    figure = new_figure(height, headline(run))
    left = (14 - len(names) * side - (len(names) - 1) * _GAP) / 2
    known = run.results.members
    for i, name in enumerate(names):
        box = ((left + i * (side + _GAP)) / 14, _BELOW / height, side / 14, side / height)
        axes = figure.add_axes(box, label=name)
        if i < len(kept):
            k = int(kept[i])
            shares = _shares(regions, np.eye(len(weights))[k])
            title = f"{name} (λ = {weights[k]:.2f})"
            robust = known[k].robust if k < len(known) else Accuracy()
        else:
            shares, title, robust = _shares(regions, weights), name, run.robust
        _draw_plane(axes, run, regions, shares)
        axes.tick_params(labelleft=i == 0)
        right = "" if robust.value is None else f": {text_of(robust.value)} % robust"
        axes.set_title(title + right, fontsize=13)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="upper center", bbox_to_anchor=(0.5, (_BELOW - 0.25) / height), ncols=6)
    more = f" Of {len(weights)} members the {len(kept)} of the largest weight." if len(weights) > len(kept) > 0 else ""
    footnote(
        figure,
        "Colours: the answer at each point"
        + ("; for the mixture mixed by the probabilities of the answers. " if len(weights) > 1 else ". ")
        + "Outlines: how far the attack can move a test point, one of each class. Arrows: where it moves that point, "
        "to the worst place found for all members together." + more,
    )
    return figure


def _shares(regions: Regions, weights: np.ndarray) -> np.ndarray:
    """The probability [G, G, C] of each answer for weights [L]."""
    classes = np.arange(len(regions.class_names))
    return np.einsum("k,kijc->ijc", weights, (regions.answers[..., None] == classes).astype(np.float64))


def _draw_plane(axes: Axes, run: Run, regions: Regions, shares: np.ndarray) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Circle, Rectangle

    colours = [CLASS_COLOURS[c % len(CLASS_COLOURS)] for c in range(len(regions.class_names))]
    image = 1 - 0.5 * shares @ (1 - np.array([to_rgb(colour) for colour in colours]))
    axes.imshow(image.clip(0, 1), extent=(0, 1, 0, 1), origin="lower", interpolation="nearest")
    for c, name in enumerate(regions.class_names):
        own = regions.points[regions.labels == c]
        axes.plot(*own.T, MARKERS[c % len(MARKERS)], color=colours[c], markersize=4, label=f"class {name}")
    for i, worst in zip(regions.shown, regions.worst, strict=True):
        x, y = (float(v) for v in regions.points[i])
        eps, edge = run.eps or 0.0, {"fill": False, "edgecolor": colours[regions.labels[i]], "linewidth": 1.8}
        square = Rectangle((x - eps, y - eps), 2 * eps, 2 * eps, **edge)
        axes.add_patch(square if run.norm == "linf" else Circle((x, y), eps, **edge))
        if np.abs(worst - regions.points[i]).max() > 1e-6:
            look: Any = {"arrowstyle": "-|>", "mutation_scale": 15, "color": "black", "linewidth": 1.4, "shrinkA": 3}
            axes.annotate("", xy=tuple(worst), xytext=(x, y), arrowprops=look | {"shrinkB": 0})
    axes.set(xlim=(0, 1), ylim=(0, 1))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks([0, 0.5, 1], ["0", "0.5", "1"])
    axes.grid(visible=False)
