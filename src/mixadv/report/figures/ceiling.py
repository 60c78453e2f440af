"""The figure of ``task=ceiling``: both optima against eps, and the closest pairs of images of different classes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixadv import records
from mixadv.files import read_arrays
from mixadv.redaction import printable
from mixadv.report.figures.examples import show_image
from mixadv.report.figures.style import CLEAN_COLOUR, DASHES, MEMBER_COLOURS, VALUE_COLOUR, footnote, new_figure, spaced
from mixadv.report.files import Run
from mixadv.report.names import format_eps, norm_symbol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHOWN = 6


class Pictures(NamedTuple):
    """The closest pairs of images of different classes.

    Attributes:
        images: [K, 2, C, H, W] in [0, 1]. middles: [K, C, H, W].
        names: [K, 2], their classes. distances: [K].
    """

    images: np.ndarray
    middles: np.ndarray
    names: list[tuple[str, str]]
    distances: np.ndarray


def read_pictures(run: Run) -> Pictures | None:
    """The pairs of `ceiling.npz` that can be drawn; None if there are none.

    Raises:
        ValueError: the file is damaged.
    """
    path = run.path / records.CEILING
    arrays = read_arrays(path)
    if arrays is None:
        return None
    try:
        pairs, images = arrays["closest"][:SHOWN], arrays["closest_images"][:SHOWN] / 255
        classes, middles = arrays["class_names"][arrays[records.LABELS][pairs]], arrays["closest_middles"][:SHOWN]
        distances = arrays["closest_distances"][:SHOWN]
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({type(error).__name__}: {error})") from error
    if images.ndim != 5 or images.shape[2] not in (1, 3) or not len(images):
        return None
    return Pictures(images, middles, [(str(a), str(b)) for a, b in classes], distances)


def ceiling_figure(run: Run, about: str, pictures: Pictures | None) -> Figure:
    """Left: the optima and the share without conflict against eps. Right: the closest pairs, one in each column.

    Its axes are labelled "optima", and "first 0", "middle 0", "second 0", and so on.
    """
    figure = new_figure(6.6, f"The best of all classifiers under attack: {about}")
    _draw_optima(figure.add_axes((0.055, 0.29, 0.405, 0.57), label="optima"), run)
    if pictures is not None:
        _draw_pairs(figure, pictures, norm_symbol(run.norm))
    footnote(
        figure,
        "Over all classifiers, of any size and training, on these images. Two images of different classes conflict if "
        "their balls meet: there every classifier is wrong about one of them. Right: the closest images of different "
        "classes (above, below), and between them the image in which their balls meet first.",
    )
    return figure


def _draw_optima(axes: Axes, run: Run) -> None:
    rows = run.results.ceiling
    eps = np.array([row.eps for row in rows], dtype=np.float64)

    def line(name: str) -> np.ndarray:
        return np.array([getattr(row, name) for row in rows], dtype=np.float64)

    conflict_free = 1 - line("in_conflict")
    axes.plot(eps, conflict_free, color="#888888", linestyle=DASHES[2], marker="v", label="images without a conflict")
    for name, label, colour, marker, size, dashes in (
        ("randomised", "best mixture", MEMBER_COLOURS[0], "o", 11, DASHES[0]),
        ("deterministic", "best classifier", VALUE_COLOUR, "s", 5, DASHES[1]),
    ):
        low, high = line(name), line(f"{name}_upper")
        open_ = high - low > 1e-9
        known = np.where(open_, np.nan, high)
        axes.plot(eps, known, color=colour, marker=marker, markersize=size, linestyle=dashes, label=label)
        if open_.any():
            axes.fill_between(eps, low, high, color=colour, alpha=0.2, linewidth=0, label=f"{label}: between bounds")
            # The band of a single radius has no width.
            axes.vlines(eps[open_], low[open_], high[open_], color=colour, linewidth=size / 2, alpha=0.6)
    first = run.results.first_conflict_eps
    if first is not None and first <= 1.5 * eps.max():
        axes.axvline(first, color=CLEAN_COLOUR, linestyle=DASHES[1], linewidth=1.4, label="first conflict")
    axes.set(ylim=(0, 1.03), xlabel="ε", ylabel="accuracy under attack")
    axes.set_xlim(left=0)
    if run.norm == "linf":
        ticks = spaced([0.0, *eps], 0.08)
        axes.set_xticks(ticks, ["0", *map(format_eps, ticks[1:])])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2, fontsize=11)


def _draw_pairs(figure: Figure, pictures: Pictures, norm: str) -> None:
    count = len(pictures.images)
    width, height = 0.485 / SHOWN, 0.22
    for k in range(count):
        shown = (pictures.images[k, 0], pictures.middles[k], pictures.images[k, 1])
        for r, (name, image) in enumerate(zip(("first", "middle", "second"), shown, strict=True)):
            box = (0.505 + k * width, 0.655 - r * (height + 0.005), width * 0.94, height * 0.94)
            axes = figure.add_axes(box, label=f"{name} {k}")
            show_image(axes, image)
            first, second = (printable(text)[:12] for text in pictures.names[k])
            if name == "first":
                axes.set_title(first, fontsize=11, parse_math=False)
            if name == "second":
                words = f"{second}\n{norm} distance\n{pictures.distances[k]:.4g}"
                axes.set_xlabel(words, fontsize=11, parse_math=False)
