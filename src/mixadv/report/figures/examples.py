"""The figure of examples.npz: clean images, attacked images and their differences."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixadv import records
from mixadv.files import read_arrays
from mixadv.redaction import printable
from mixadv.report.figures.style import footnote, new_figure
from mixadv.report.files import Run
from mixadv.report.tables import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS, MOST = 8, 24
_LEFT, _HEADING, _BELOW = 1.15, 0.6, 0.9  # inches


class Examples(NamedTuple):
    """The content of examples.npz.

    Attributes:
        x, x_adv: clean and attacked images [K, C, H, W] in [0, 1], C = 1 or 3.
        labels: K names of classes.
        correct: [L, K] bool, which members are right at x_adv.
        found_by: K names of passes; "clean" if no point was worse than x.
    """

    x: np.ndarray
    x_adv: np.ndarray
    labels: list[str]
    correct: np.ndarray
    found_by: list[str]


def read_examples(run: Run) -> Examples | None:
    """The content of `examples.npz`; None if it does not exist or has no images.

    Raises:
        ValueError: the file is damaged, or the shapes of its arrays do not match.
    """
    path = run.path / records.EXAMPLES
    arrays = read_arrays(path)
    if arrays is None:
        return None
    missing = [name for name in Examples._fields if name not in arrays]
    if missing:
        raise ValueError(f"{path} has no {missing[0]!r}")
    x, x_adv, correct = (arrays[name] for name in (records.X, records.X_ADV, records.CORRECT))
    if x.ndim != 4 or x.shape[1] not in (1, 3) or x_adv.shape != x.shape:
        raise ValueError(
            f"{path}: x {x.shape} and x_adv {x_adv.shape} must be one shape [K, C, H, W] with 1 or 3 channels"
        )
    count = len(x)
    labels, found_by = arrays[records.LABELS], arrays[records.FOUND_BY]
    if labels.shape != (count,) or found_by.shape != (count,) or correct.ndim != 2 or correct.shape[1] != count:
        raise ValueError(f"{path}: labels, found_by [K] and correct [L, K] do not fit {count} images")
    if any(a.dtype.kind not in "fbiu" for a in (x, x_adv, correct)) or not np.isfinite([x, x_adv]).all():
        raise ValueError(f"{path}: x and x_adv must be finite numbers, correct 0 or 1")
    if not count:
        return None
    return Examples(x, x_adv, [str(v) for v in labels], correct.astype(bool), [str(v) for v in found_by])


def amplification(difference: np.ndarray) -> float:
    """The largest factor in ..., 0.5, 1, 2, 5, 10, ... with factor · |difference| <= 1/2; 1 if the difference is 0.

    Then 1/2 + factor · difference is in [0, 1].
    """
    largest = float(np.abs(difference).max(initial=0.0))
    if largest == 0:
        return 1.0
    # With a tolerance, because 8/255 in float32 may be above 8/255.
    limit = 0.5 / largest * (1 + 1e-6)
    decade = 10.0 ** math.floor(math.log10(limit))
    return max(step * decade for step in (1.0, 2.0, 5.0) if step * decade <= limit)


def examples_figure(run: Run, examples: Examples) -> Figure:
    """A grid with one column per image: clean, attacked, amplified difference; its axes are labelled "clean 0", ...

    The label is above a column; below are the members that are wrong at the attacked image, and the pass that found
    it. The difference is drawn as 1/2 + factor · (x_adv - x): grey is no change.
    """
    count = min(len(examples.x), MOST)
    columns, bands = min(count, COLUMNS), math.ceil(count / COLUMNS)
    cell = (13.85 - _LEFT) / COLUMNS
    band = 3 * cell + _HEADING + _BELOW
    height = 0.55 + bands * band + 0.65
    figure = new_figure(height, headline(run, "worst cases found"))
    difference = examples.x_adv - examples.x
    factor = amplification(difference[:count])
    rows = {"clean": examples.x, "attacked": examples.x_adv, "difference": 0.5 + factor * difference}
    left = _LEFT + (COLUMNS - columns) * cell / 2
    for i in range(count):
        top = height - 0.55 - (i // COLUMNS) * band - _HEADING
        for r, (name, images) in enumerate(rows.items()):
            box = (left + (i % COLUMNS) * cell, top - (r + 1) * cell, cell - 0.07, cell - 0.07)
            axes = figure.add_axes((box[0] / 14, box[1] / height, box[2] / 14, box[3] / height), label=f"{name} {i}")
            show_image(axes, images[i])
            if i % COLUMNS == 0:
                heading = name if name != "difference" else f"difference\n× {factor:g}"
                axes.set_ylabel(heading, rotation=0, ha="right", va="center", fontsize=12)
            if name == "clean":
                axes.set_title(_wrapped(examples.labels[i], 16, 2), fontsize=12, pad=5, parse_math=False)
            elif name == "difference":
                words = (wrong_members(examples.correct[:, i]), examples.found_by[i])
                below = "\n".join(_wrapped(line, 20, 2) for line in words)
                axes.set_xlabel(below, fontsize=9.5, labelpad=5, parse_math=False)
    footnote(figure, _caption(examples, count, factor))
    return figure


def wrong_members(correct: np.ndarray) -> str:
    """In words, which members are wrong, from correct [L] bool."""
    if len(correct) == 1:
        return "right" if correct[0] else "wrong"
    wrong = np.flatnonzero(~correct)
    if not len(wrong):
        return "all members right"
    if len(wrong) == len(correct):
        return "all members wrong"
    if len(wrong) <= 4:
        return f"wrong: {', '.join(map(str, wrong))}"
    return f"all wrong but {', '.join(map(str, np.flatnonzero(correct)))}"


def _caption(examples: Examples, count: int, factor: float) -> str:
    parts = [
        f"Grey in the last row is no change; it shows 1/2 + {factor:g} · (attacked − clean).",
        'Below: which members are wrong at the attacked image, and the attack that found it ("clean": no attack found '
        "a worse point than the image itself).",
    ]
    if count < len(examples.x):
        parts.append(f"The first {count} of {len(examples.x)} images.")
    return " ".join(parts)


def show_image(axes: Axes, image: np.ndarray) -> None:
    """Draw one image [C, H, W] in [0, 1] without interpolation."""
    pixels = np.clip(image.transpose(1, 2, 0), 0.0, 1.0).astype(np.float64)
    if pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    axes.imshow(pixels, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(visible=False)
    for spine in axes.spines.values():
        spine.set_visible(True)
        spine.set_color("#BBBBBB")


def _wrapped(text: str, width: int, most: int) -> str:
    """At most `most` lines of `width` characters; longer text ends in an ellipsis."""
    return textwrap.fill(printable(text), width, max_lines=most, placeholder="…")
