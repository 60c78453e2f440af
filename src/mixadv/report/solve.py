"""What `task=solve` found: the table of members and mixtures, the certificate in words, and the figure."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.table import Table
from rich.text import Text

from mixadv.errors import UserError
from mixadv.report.comparison import paired
from mixadv.report.figures import CLEAN, ROBUST, footnote, member_style, new_figure, save
from mixadv.report.files import Run, read_records, read_run
from mixadv.report.names import format_ball, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = {"clean": "clean %", "pool": "pool %", "fresh": "fresh %", "test": "test % [95 % interval]"}


def solution_table(run: Run) -> Table:
    """Every member alone, uniform and optimal weights: clean and robust accuracies, the test set's with intervals.

    *pool*: over the points that chose the weights, on the validation images. *fresh attacks*: the same images, new
    attacks on everybody. *test*: the test images, attacked for the first time.
    """
    fit = run.get("solve", "fit") or {}
    table = Table(
        title=Text(
            f"{run.get('data', 'name')}, {format_ball(run.norm, run.eps)}: {len(run.weights)} classifiers weighed"
        ),
        caption=Text(_caption(run, fit)),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    table.add_column("λ", justify="right", no_wrap=True)
    for title in COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    rows = run.get("solve", "rows") or []
    for index, row in enumerate(rows):
        if index == len(rows) - 2:
            table.add_section()
        member = index < len(run.weights)
        cells = [_cell(row.get(column), interval=column == "test") for column in COLUMNS]
        weight = f"{run.weights[index]:.4f}" if member else ""
        table.add_row(str(row.get("who")), weight, *cells, style="bold" if index == len(rows) - 1 else "")
    return table


def _headline(run: Run) -> str:
    ball = format_ball(run.norm, run.eps)
    return f"{run.get('data', 'name')} · {ball} · optimal weights over {len(run.weights)} classifiers"


def _caption(run: Run, fit: dict[str, Any]) -> str:
    return (
        f"Robust accuracy: pool, on the points that chose the weights ({fit.get('num_examples')} validation images, "
        f"{fit.get('num_attacks')} responses of the attacker, {fit.get('status')}); fresh, new attacks there; test, "
        f"{run.num_examples} test images. Attacks: {', '.join(run.attacks)}; every point is replayed on everybody; "
        "members alone are attacked by PGD and APGD."
    )


def _cell(entry: Any, *, interval: bool) -> str:
    if not isinstance(entry, dict):
        return "–"
    text = f"{100 * entry['accuracy']:.1f}"
    if interval:
        low, high = entry["ci95"]
        text += f" [{100 * low:.1f}, {100 * high:.1f}]"
    return text


def solution_sentences(run: Run) -> list[str]:
    """The certificate, and what holds beyond the interval on the test set."""
    known = run.get("solve", "certificate") or {}
    rows = run.get("solve", "rows") or []
    if not known or len(rows) < 3:
        return []
    images = (run.get("solve", "fit") or {}).get("num_examples")
    # Rounded so that the sentences stay true: the limit up, what is reached down.
    limit = math.ceil(1e4 * (1 - known["value_lp"]) - 1e-6) / 100
    reached = math.floor(1e4 * (1 - known["value_at_weights"]) + 1e-6) / 100
    apart = 100 * max(0.0, known["value_at_weights"] - known["value_lp"])
    sentences = [
        f"Certain: on these {images} validation images no weights over these members have a robust accuracy above "
        f"{limit:.2f} %, because the points found are real.",
        f"Estimate: the chosen weights have {reached:.2f} % against every point found there ({apart:.2f} points from "
        "the limit); stronger attacks may lower it.",
    ]
    notes = [f"{m['name']}: {m['note']}" for m in run.get("solve", "members") or [] if m.get("note") != "as exported"]
    if notes:
        sentences.append(f"Inputs: {'; '.join(notes)}.")
    fit = run.get("solve", "fit") or {}
    if fit.get("status") == "stopped":
        sentences.append("The value was still moving when the rounds were over: raise lambda_solver.num_rounds.")
    try:
        records = read_records(run)
    except ValueError as error:
        return [*sentences, f"No paired differences: {error}."]
    robust, even, members = records["robust"], records.get("robust uniform"), records.get("members_robust")
    best = max(range(len(rows) - 2), key=lambda k: rows[k]["fresh"]["accuracy"])
    if max(run.weights) == 1.0:
        alone = run.weights.index(1.0)
        sentences.append(f"The optimal weights are those of {rows[alone]['who']} alone: mixing gains nothing here.")
    rivals = [("uniform mixture", even)]
    if members is not None and run.weights[best] < 1:
        rivals.insert(0, (f"best member on the validation images ({rows[best]['who']})", members[best]))
    for name, other in rivals:
        if other is None or other.shape != robust.shape or len(robust) < 2:
            continue
        result = paired(robust.astype(np.float64) - other.astype(np.float64))
        points, low, high = result.in_points()
        verdict = result.verdict("the optimal mixture is more robust", "the optimal mixture is less robust")
        sentences.append(
            f"Test set: optimal mixture minus {name}: {points} points, 95 % interval [{low}, {high}], paired over "
            f"{len(robust):,} images: {verdict}."
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
    figure = new_figure(max(6.0, 3.6 + 0.45 * len(rows)))
    figure.suptitle(_headline(run), fontsize=16, y=0.98)
    _draw_rounds(figure.add_axes((0.06, 0.31, 0.25, 0.57), label="rounds"), run)
    _draw_weights(figure.add_axes((0.37, 0.31, 0.17, 0.57), label="weights"), run)
    _draw_accuracies(figure.add_axes((0.68, 0.31, 0.30, 0.57), label="accuracy"), run)
    for axes in figure.axes:
        columns = 3 if axes.get_label() == "accuracy" else 2
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=columns, columnspacing=1.0, fontsize=11)
    footnote(figure, _caption(run, run.get("solve", "fit") or {}) + " Whiskers: Wilson's 95 % intervals.")
    return figure


def _draw_rounds(axes: Axes, run: Run) -> None:
    history = run.get("solve", "history") or {}
    values = [100 * (1 - v) for v in map(number, history.get("value", [])) if v is not None]
    bounds = [100 * (1 - v) for v in map(number, history.get("lower_bound", [])) if v is not None]
    axes.plot(range(1, len(bounds) + 1), bounds, color=CLEAN, marker="v", label="limit (certain)")
    axes.plot(range(1, len(values) + 1), values, color=ROBUST, marker="o", label="reached (estimate)")
    axes.set_xlabel("round")
    axes.set_ylabel("robust accuracy, validation %")
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
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("round")
    axes.set_ylabel("λ")
    _whole_rounds(axes, len(weights))


def _draw_accuracies(axes: Axes, run: Run) -> None:
    rows = run.get("solve", "rows")
    styles = (("pool", "#888888", "s", 0.18), ("fresh", CLEAN, "o", 0.0), ("test", ROBUST, "D", -0.18))
    for column, colour, marker, offset in styles:
        for index, row in enumerate(rows):
            value, (low, high) = row[column]["accuracy"], row[column]["ci95"]
            axes.errorbar(
                100 * value,
                len(rows) - 1 - index + offset,
                xerr=[[100 * max(0.0, value - low)], [100 * max(0.0, high - value)]],
                color=colour,
                marker=marker,
                capsize=3,
                linestyle="none",
                label={"pool": "pool", "fresh": "fresh attacks", "test": "test set"}[column] if index == 0 else None,
            )
    labels = [str(row["who"]) for row in rows]
    axes.set_yticks(range(len(rows)), [label if len(label) <= 24 else "…" + label[-23:] for label in reversed(labels)])
    axes.axhline(1.5, color="#BBBBBB", linewidth=1)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xlabel("robust accuracy %")
