"""What `task=solve` found: the table of members and mixtures, the certificate in words, and the figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table

from mixadv.errors import UserError
from mixadv.report.cells import add_row, new_table, percent, percent_with
from mixadv.report.comparison import paired
from mixadv.report.figures.style import CLEAN, ROBUST, footnote, member_style, new_figure, save
from mixadv.report.files import Run, read_run, stored_interval
from mixadv.report.names import format_ball, number
from mixadv.report.records import ALL, EVEN, measured

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {"clean": "clean %", "pool": "pool %", "fresh": "fresh %", "test": "test % [95 % interval]"}


def solution_table(run: Run) -> Table:
    """Every member alone, uniform and optimal weights: clean and robust accuracies, the test set's with intervals.

    *pool*: over the points that chose the weights, on the validation images. *fresh attacks*: the same images, new
    attacks on everybody. *test*: the test images, attacked for the first time.
    """
    table = new_table(
        f"{run.get('data', 'name')}, {format_ball(run.norm, run.eps)}: {len(run.weights)} classifiers weighed",
        ["", "λ", *COLUMNS.values()],
        words=[""],
        folds={"": 1},
        caption=_caption(run),
    )
    rows = run.get("solve", "rows") or []
    for index, row in enumerate(rows):
        if index == len(rows) - 2:
            table.add_section()
        clean, pool, fresh, test = (stored_interval(row.get(column), "accuracy") for column in COLUMNS)
        cells = [str(row.get("who")), f"{run.weights[index]:.4f}" if index < len(run.weights) else ""]
        cells += [*(percent(at.value) for at in (clean, pool, fresh)), percent_with(test)]
        add_row(table, cells, style="bold" if index == len(rows) - 1 else "")
    return table


def _caption(run: Run) -> str:
    fit = run.get("solve", "fit") or {}
    return (
        f"Robust accuracy: pool, on the points that chose the weights ({fit.get('num_examples')} validation images, "
        f"{fit.get('num_attacks')} responses of the attacker, {fit.get('status')}); fresh, new attacks there; test, "
        f"{run.num_examples} test images. Attacks: {', '.join(run.attacks)}; every point is replayed on everybody; "
        "members alone are attacked by PGD and APGD."
    )


def solution_sentences(run: Run) -> list[str]:
    """The certificate, and what holds beyond the interval on the test set."""
    known = run.get("solve", "certificate") or {}
    rows = run.get("solve", "rows") or []
    if not known or len(rows) < 3:
        return []
    # Rounded so that the sentences stay true: the limit up, what is reached down.
    limit = math.ceil(1e4 * (1 - known["value_lp"]) - 1e-6) / 100
    reached = math.floor(1e4 * (1 - known["value_at_weights"]) + 1e-6) / 100
    apart = 100 * max(0.0, known["value_at_weights"] - known["value_lp"])
    sentences = [
        f"Certain: on these {run.get('solve', 'fit', 'num_examples')} validation images no weights over these members "
        f"have a robust accuracy above {limit:.2f} %, because the points found are real.",
        f"Estimate: the chosen weights have {reached:.2f} % against every point found there ({apart:.2f} points from "
        "the limit); stronger attacks may lower it.",
    ]
    notes = [f"{m['name']}: {m['note']}" for m in run.get("solve", "members") or [] if m.get("note") != "as exported"]
    if notes:
        sentences.append(f"Inputs: {'; '.join(notes)}.")
    if run.get("solve", "fit", "status") == "stopped":
        sentences.append("The value was still moving when the rounds were over: raise lambda_solver.num_rounds.")
    try:
        found = measured(run)
    except ValueError as error:
        return [*sentences, f"No paired differences: {error}."]
    best = max(range(len(rows) - 2), key=lambda k: rows[k]["fresh"]["accuracy"])
    if max(run.weights) == 1.0:
        alone = run.weights.index(1.0)
        sentences.append(f"The optimal weights are those of {rows[alone]['who']} alone: mixing gains nothing here.")
    rivals = {}
    if found.members is not None and run.weights[best] < 1:
        rivals[f"best member on the validation images ({rows[best]['who']})"] = found.members[best]
    if EVEN in found.accuracies:
        rivals["uniform mixture"] = found.accuracies[EVEN]
    for name, other in rivals.items():
        result = paired(found.accuracies[ALL] - other)
        verdict = result.verdict("the optimal mixture is more robust", "the optimal mixture is less robust")
        sentences.append(
            f"Test set: optimal mixture minus {name}: {result.in_words()}, paired over "
            f"{len(other):,} images: {verdict}."
        )
    return sentences


def draw_solution(run_dir: str | Path) -> Path:
    """Draw `solve.png`: how value and bound met, and everybody's robust accuracy with intervals.

    Raises:
        UserError: the results are not those of task=solve, or the directory cannot be written.
    """
    run = read_run(run_dir)
    if not run.get("solve", "rows"):
        raise UserError(f"nothing to draw in {run.path}: its results.json is not that of task=solve")
    return save(lambda: solution_figure(run), run.path / "solve.png")


def solution_figure(run: Run) -> Figure:
    """The figure of `draw_solution`; its axes are labelled "rounds", "weights" and "accuracy"."""
    rows = run.get("solve", "rows")
    ball = format_ball(run.norm, run.eps)
    title = f"{run.get('data', 'name')} · {ball} · optimal weights over {len(run.weights)} classifiers"
    figure = new_figure(max(6.0, 3.6 + 0.45 * len(rows)), title)
    _draw_rounds(figure.add_axes((0.06, 0.31, 0.25, 0.57), label="rounds"), run)
    _draw_weights(figure.add_axes((0.37, 0.31, 0.17, 0.57), label="weights"), run)
    _draw_accuracies(figure.add_axes((0.68, 0.31, 0.30, 0.57), label="accuracy"), run)
    for axes in figure.axes:
        columns = 3 if axes.get_label() == "accuracy" else 2
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, columnspacing=1.0, fontsize=11)
    footnote(figure, _caption(run) + " Whiskers: Wilson's 95 % intervals.")
    return figure


def _draw_rounds(axes: Axes, run: Run) -> None:
    history = run.get("solve", "history") or {}
    values = [100 * (1 - v) for v in map(number, history.get("value", [])) if v is not None]
    bounds = [100 * (1 - v) for v in map(number, history.get("lower_bound", [])) if v is not None]
    axes.plot(range(1, len(bounds) + 1), bounds, color=CLEAN, marker="v", label="limit (certain)")
    axes.plot(range(1, len(values) + 1), values, color=ROBUST, marker="o", label="reached (estimate)")
    axes.set(xlabel="round", ylabel="robust accuracy, validation %")
    _whole_rounds(axes, len(bounds))


def _whole_rounds(axes: Axes, count: int) -> None:
    axes.set_xlim(0.5, max(count, 1) + 0.5)
    axes.set_xticks(range(1, max(count, 1) + 1, max(1, count // 8)))


def _draw_weights(axes: Axes, run: Run) -> None:
    weights = np.asarray((run.get("solve", "history") or {}).get("weights", []), dtype=float)
    names = [str(row["who"]) for row in run.get("solve", "rows")]
    for k in range(weights.shape[1] if weights.ndim == 2 else 0):
        label = names[k] if len(names[k]) <= 14 else f"{k}"
        axes.plot(range(1, len(weights) + 1), weights[:, k], marker=".", label=label, **member_style(k))
    axes.set(ylim=(-0.03, 1.03), xlabel="round", ylabel="λ")
    _whole_rounds(axes, len(weights))


def _draw_accuracies(axes: Axes, run: Run) -> None:
    rows = run.get("solve", "rows")
    styles = (("pool", "#888888", "s", 0.18), ("fresh", CLEAN, "o", 0.0), ("test", ROBUST, "D", -0.18))
    for column, colour, marker, offset in styles:
        for index, row in enumerate(rows):
            value, (low, high) = row[column]["accuracy"], row[column]["ci95"]
            error = [[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]]
            label = {"pool": "pool", "fresh": "fresh attacks", "test": "test set"}[column] if index == 0 else None
            look: dict[str, Any] = {"color": colour, "marker": marker, "capsize": 3, "linestyle": "none"}
            axes.errorbar(100 * value, len(rows) - 1 - index + offset, xerr=error, label=label, **look)
    labels = [str(row["who"]) for row in rows]
    axes.set_yticks(range(len(rows)), [label if len(label) <= 24 else "…" + label[-23:] for label in reversed(labels)])
    axes.axhline(1.5, color="#BBBBBB", linewidth=1)
    axes.set(ylim=(-0.6, len(rows) - 0.4), xlabel="robust accuracy %")
