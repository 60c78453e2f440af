"""The figure of a training: accuracy, lambda and losses against epochs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.errors import UserError
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    LOSS_COLOUR,
    ROBUST_COLOUR,
    VALUE_COLOUR,
    footnote,
    member_style,
    new_figure,
    running_mean,
    save,
    whisker,
)
from mixadv.report.files import Run, opened
from mixadv.report.tables import headline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Fixed positions: matplotlib's automatic layouts shrink the axes for the legends below them.
_BOTTOM, _HEIGHT, _LEGEND_TOP = 0.32, 0.55, 0.205
_PANELS = {"accuracy": (0.05, 0.245), "test": (0.3, 0.125), "lambda": (0.485, 0.215), "loss": (0.765, 0.222)}


def draw_curves(run: Run | str | Path) -> Path:
    """Draw `curves.png` of a run from its history and, if there are any, its results.

    Three panels against epochs per model: validation accuracy of the mixture (dashed: of the baseline); lambda;
    training loss and value of the game. Test accuracies with 95 % intervals stand beside the first panel.

    Raises:
        UserError: there is no history to draw, or the directory cannot be written.
    """
    run = opened(run)
    if not run.has_history:
        raise UserError(f"nothing to draw in {run.path}: its metrics.csv is missing, empty or damaged")
    return save(lambda: curves_figure(run), run.path / "curves.png")


def curves_figure(run: Run) -> Figure:
    """The figure of `draw_curves`; its axes are labelled "accuracy", "test", "lambda" and "loss"."""
    figure = new_figure(6.0, headline(run))
    panels: dict[str, Axes] = {}
    for name, (left, width) in _PANELS.items():
        share: dict[str, Any] = {"sharey" if name == "test" else "sharex": panels.get("accuracy")}
        panels[name] = figure.add_axes((left, _BOTTOM, width, _HEIGHT), label=name, **share)
    _draw_accuracy(panels["accuracy"], run)
    _draw_test(panels["test"], run)
    _draw_weights(panels["lambda"], run)
    _draw_loss(panels["loss"], run)
    for name in ("accuracy", "lambda", "loss"):
        panels[name].set_xlabel("epochs per model")
        panels[name].set_xlim(left=0)
        if panels[name].lines:
            _legend(figure, panels[name])
        else:
            _nothing(panels[name], "nothing recorded")
    footnote(figure, _footer(run))
    return figure


def _legend(figure: Figure, axes: Axes) -> None:
    left, width = _PANELS[str(axes.get_label())]
    handles, labels = axes.get_legend_handles_labels()
    columns, many = 1 if axes.get_label() == "loss" else 2, len(labels) > 6
    if many:
        # Full names are too wide for many columns.
        labels = [label.removeprefix("member ") for label in labels]
        columns = math.ceil(len(labels) / (2 if len(labels) <= 12 else 3))
    figure.legend(
        handles,
        labels,
        title="member" if many else None,
        fontsize=12 if len(labels) <= 12 else 9,
        loc="upper center",
        bbox_to_anchor=(left + width / 2, _LEGEND_TOP),
        ncols=columns,
        handlelength=1.4 if many else 1.8,
        columnspacing=0.8 if many else 1.0,
    )


def column(run: Run, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Epochs per model [n] and values [n] of a column of the history, from the rows that have both."""
    if not {"epoch", name} <= run.history.keys():
        return np.array([]), np.array([])
    epochs, values = run.history["epoch"], run.history[name]
    keep = np.isfinite(epochs) & np.isfinite(values)
    return epochs[keep], values[keep]


def _draw_accuracy(axes: Axes, run: Run) -> None:
    single = run.num_members == 1
    for which, name, dash in ((run, "model" if single else "mixture", "-"), (run.baseline, "baseline", "--")):
        for measure, colour, marker in (("clean", CLEAN_COLOUR, "o"), ("robust", ROBUST_COLOUR, "s")):
            x, y = column(which, f"val/{measure}_accuracy") if which is not None else ((), ())
            if len(x):
                look: Any = {"color": colour, "linestyle": dash, "markerfacecolor": colour if dash == "-" else "white"}
                marker = marker if len(x) <= 30 else ""
                axes.plot(x, y, label=f"{name}, {measure}", marker=marker, markersize=5, **look)
    axes.set(ylim=(0, 1), ylabel="accuracy", title="Validation")


def _draw_test(axes: Axes, run: Run) -> None:
    ticks: dict[float, str] = {}
    at = 0.0
    for which, name in ((run, "model" if run.num_members == 1 else "mixture"), (run.baseline, "baseline")):
        if which is None or which.robust.value is None:
            continue
        ticks[at] = name
        for measure, colour, marker in (("clean", CLEAN_COLOUR, "o"), ("robust", ROBUST_COLOUR, "s")):
            look = {"color": colour, "marker": marker, "markerfacecolor": colour if which is run else "white"}
            whisker(
                axes,
                at,
                which.clean if measure == "clean" else which.robust,
                capsize=5,
                markersize=7,
                label=f"{name} {measure}",
                **look,
            )
        at += 1.0
        members = run.results.members
        if which is run and len(members) > 1:
            places = at - 0.2 + 0.4 * np.arange(len(members))
            ticks[float(places.mean())] = "members"
            for k, (x, member) in enumerate(zip(places, members, strict=True)):
                for measure, value, marker in (("clean", member.clean, "o"), ("robust", member.robust.value, "s")):
                    if value is not None:
                        colour, label = member_style(k)["color"], f"member {k} {measure}"
                        axes.plot(x, value, linestyle="", marker=marker, markersize=6, color=colour, label=label)
            at = float(places[-1]) + 0.8
    axes.set_title("Test")
    axes.tick_params(axis="y", left=False, labelleft=False)
    axes.set_xticks(list(ticks), list(ticks.values()), rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_color("#BBBBBB")
    if ticks:
        axes.set_xlim(-0.6, at - 0.4)
    else:
        _nothing(axes, "not\nevaluated\nyet")


def weight_of(run: Run, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Epochs [n] and lambda_k [n] of the weights phases, and the last value once more at the end of the history."""
    x, y = column(run, f"lambda/{k}")
    if not len(x):
        return x, y
    end = float(np.nanmax(run.history["epoch"], initial=0.0))
    return np.append(x, max(end, x[-1])), np.append(y, y[-1])


def _draw_weights(axes: Axes, run: Run) -> None:
    count = run.num_members or sum(name.startswith("lambda/") for name in run.history)
    for k in range(count):
        x, y = weight_of(run, k)
        if len(x):
            axes.plot(x, y, drawstyle="steps-post", label=f"member {k}", **member_style(k))
    if axes.lines:
        axes.axhline(1 / count, color="#555555", linestyle=":", linewidth=1.5, label=f"1/L = {1 / count:.3g}")
    axes.set(ylim=(-0.02, 1.02), ylabel="weight λ", title="Mixture weights")


def _draw_loss(axes: Axes, run: Run) -> None:
    lines: Any = (
        ("train/loss", "training loss", "o", {"color": LOSS_COLOUR, "markersize": 4}),
        ("weights/value", "game value", "D", {"color": VALUE_COLOUR, "markersize": 4}),
        ("weights/lower_bound", "its lower bound", "_", {"color": VALUE_COLOUR, "linestyle": ":", "linewidth": 1.5}),
    )
    for name, label, marker, look in lines:
        x, y = column(run, name)
        if not len(y):
            continue
        window = _window(y)
        if window > 1 and "linestyle" not in look:
            axes.plot(x, y, color=look["color"], alpha=0.25, linewidth=1.0, label=f"_{name} raw")
            label += f" (mean of {window})"
        axes.plot(x, running_mean(y, window), label=label, marker=marker if len(y) <= 30 else "", **look)
    axes.set(ylabel="loss (nats)", title="Losses")
    if axes.lines and min(float(np.min(line.get_ydata())) for line in axes.lines) >= 0:
        axes.set_ylim(bottom=0)


def _window(values: np.ndarray) -> int:
    return len(values) // 25 if len(values) >= 100 else 1


def _nothing(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color="#777777")


def _footer(run: Run) -> str:
    if run.robust.value is None:
        return "" if run.state == "done" else f"{run.state}: no test results yet"
    count = "" if run.num_examples is None else f"{run.num_examples:,} test images; "
    names = ", ".join(run.results.attacks) or "an unknown attack"
    ensemble = run.results.ensemble_accuracy
    return f"Test: {count}robust = worst case per image over {names}; bars are 95 % intervals over test images." + (
        f" Ensemble accuracy (clean): {ensemble:.3f}." if ensemble is not None and run.num_members != 1 else ""
    )
