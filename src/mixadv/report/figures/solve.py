"""The figure of `task=solve`: bounds and weights per round, and accuracies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mixadv.errors import UserError
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    ROBUST_COLOUR,
    footnote,
    member_style,
    new_figure,
    save,
)
from mixadv.report.files import Run, opened
from mixadv.report.names import format_ball
from mixadv.report.solve import lines_of, solution_caption, solution_of
from mixadv.results import History, Solve, SolveRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Percentage points above and below the values.
LEAST_MARGIN = 1.0


def draw_solution(run: Run | str | Path) -> Path:
    """Draw `solve.png`: the bounds on the optimal robust accuracy and lambda against rounds; the robust accuracy of
    the members and mixtures with 95 % intervals.

    Raises:
        UserError: the run has no results of task=solve, or the directory cannot be written.
    """
    run = opened(run)
    if not solution_of(run).rows:
        raise UserError(f"nothing to draw in {run.path}: its results.json has no results of task=solve")
    return save(lambda: solution_figure(run), run.path / "solve.png")


def solution_figure(run: Run) -> Figure:
    """The figure of `draw_solution`; its axes are labelled "rounds", "weights" and "accuracy"."""
    solution, rows = solution_of(run), [line.row for line in lines_of(run)]
    ball = format_ball(run.norm, run.eps)
    title = f"{run.data} · {ball} · optimal weights over {len(run.results.weights)} classifiers"
    figure = new_figure(max(6.0, 3.6 + 0.45 * len(rows)), title)
    _draw_rounds(figure.add_axes((0.075, 0.31, 0.235, 0.57), label="rounds"), solution.history)
    _draw_weights(figure.add_axes((0.37, 0.31, 0.17, 0.57), label="weights"), solution, rows)
    _draw_accuracies(figure.add_axes((0.68, 0.31, 0.30, 0.57), label="accuracy"), rows)
    for axes in figure.axes:
        columns = 3 if axes.get_label() == "accuracy" else 2
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, columnspacing=1.0, fontsize=11)
    footnote(figure, solution_caption(run) + " Whiskers: Wilson's 95 % intervals.")
    return figure


def _draw_rounds(axes: Axes, history: History) -> None:
    values, bounds = (
        [100 * (1 - v) for v in column if v is not None] for column in (history.value, history.lower_bound)
    )
    axes.plot(range(1, len(bounds) + 1), bounds, color=CLEAN_COLOUR, marker="v", label="limit (certain)")
    axes.plot(range(1, len(values) + 1), values, color=ROBUST_COLOUR, marker="o", label="reached (estimate)")
    axes.set(xlabel="round", ylabel="robust accuracy, validation %")
    if known := [*bounds, *values]:
        # Differences below a point are not blown up to the whole axis.
        axes.set_ylim(min(known) - LEAST_MARGIN, max(known) + LEAST_MARGIN)
    axes.locator_params(axis="y", nbins=6)
    axes.ticklabel_format(axis="y", useOffset=False)
    _whole_rounds(axes, len(bounds))


def _whole_rounds(axes: Axes, count: int) -> None:
    axes.set_xlim(0.5, max(count, 1) + 0.5)
    axes.set_xticks(range(1, max(count, 1) + 1, max(1, count // 8)))


def _draw_weights(axes: Axes, solution: Solve, rows: Sequence[SolveRow]) -> None:
    """The weights of all members in each round; those without a row of their own are grey and have no label."""
    named = [row.who for row in rows]
    rounds = solution.history.weights
    for k, weights in enumerate(zip(*rounds, strict=True)):
        who = solution.rows[k].who
        look: dict[str, Any] = {"color": "#BBBBBB", "linewidth": 1}
        if who in named:
            # Behind the + is the bias.
            short = next((text for text in (who, who.rpartition(" + ")[2]) if len(text) <= 14), f"{k}")
            look = {"label": short, **member_style(named.index(who))}
        axes.plot(range(1, len(weights) + 1), weights, marker=".", **look)
    axes.set(ylim=(-0.03, 1.03), xlabel="round", ylabel="λ")
    _whole_rounds(axes, len(rounds))


def _draw_accuracies(axes: Axes, rows: Sequence[SolveRow]) -> None:
    columns: Any = (
        ("pool", [row.pool for row in rows], "#888888", "s", 0.18),
        ("fresh attacks", [row.fresh for row in rows], CLEAN_COLOUR, "o", 0.0),
        ("test set", [row.test for row in rows], ROBUST_COLOUR, "D", -0.18),
    )
    places = len(rows) - 1 - np.arange(len(rows))
    for label, column, colour, marker, offset in columns:
        known = [(at, y + offset) for at, y in zip(column, places, strict=True) if at.value is not None and at.ends]
        values = [100 * at.value for at, _ in known]
        errors = np.array([[100 * max(0.0, at.value - at.low), 100 * max(0.0, at.high - at.value)] for at, _ in known])
        look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "linestyle": "none"}
        axes.errorbar(values, [y for _, y in known], xerr=errors.reshape(-1, 2).T, label=label, **look)
    labels = [row.who for row in rows]
    axes.set_yticks(range(len(rows)), [label if len(label) <= 24 else "…" + label[-23:] for label in reversed(labels)])
    axes.axhline(1.5, color="#BBBBBB", linewidth=1)
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="robust accuracy %")
