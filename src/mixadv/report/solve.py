"""The results of `task=solve`: the table of members and mixtures, and the certificate in sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from mixadv.report.cells import Column, Table
from mixadv.report.compare import WHO, paired
from mixadv.report.files import Run
from mixadv.report.names import format_ball
from mixadv.report.records import ALL, EVEN, measured
from mixadv.results import Solve, SolveRow
from mixadv.wording import counted


class Line(NamedTuple):
    """A row of the table with its weight; "" for the mixtures, which have many."""

    row: SolveRow
    weight: float | str


SOLUTION: tuple[Column[Line], ...] = (
    Column("who", "", lambda line: line.row.who, words=True, fold=17),
    Column("weight", "λ", lambda line: line.weight, ".4f"),
    Column("pool", "validation pool %", lambda line: line.row.pool.value, ".1%", fold=10),
    Column("fresh", "validation fresh %", lambda line: line.row.fresh.value, ".1%", fold=10),
    Column("clean", "test clean %", lambda line: line.row.clean.value, ".1%", fold=7),
    Column("test", "test robust % [95 %]", lambda line: line.row.test, ".1%"),
)


def solution_table(run: Run) -> Table[Line]:
    """Clean and robust accuracies of every member and of the mixtures with uniform and with optimal weights.

    Each heading names the images. Pool: robust at the points that chose the weights, on the validation images. Fresh:
    on the same images under new attacks. The other two are on the test images.
    """
    lines = lines_of(run)
    return Table(
        f"{run.data}, {format_ball(run.norm, run.eps)}: {max(0, len(solution_of(run).rows) - 2)} classifiers weighed",
        SOLUTION,
        lines,
        solution_caption(run),
        bold=(len(lines) - 1,),
        sections=(len(lines) - 3,),
    )


def lines_of(run: Run) -> list[Line]:
    """The rows that are shown: the members, the uniform and the optimal mixture.

    The members of weight 0 with a bias are one line without numbers, except for the member that is best on the
    validation images. results.json has them all.
    """
    weights, rows = run.results.weights, solution_of(run).rows
    lines = [Line(row, weights[k] if k < len(weights) else "") for k, row in enumerate(rows)]
    members, mixtures = lines[:-2], lines[-2:]
    best = best_on_validation(rows)
    biased = [bool(one.bias) for one in run.results.members] + [False] * len(members)
    shown = [one for k, one in enumerate(members) if one.weight != 0 or k == best or not biased[k]]
    if folded := len(members) - len(shown):
        shown.append(Line(SolveRow(f"{counted(folded, 'biased member')}"), 0.0))
    return [*shown, *mixtures]


def best_on_validation(rows: Sequence[SolveRow]) -> int:
    """The number of the member that is best on the validation images, under fresh attacks."""
    return max(range(len(rows) - 2), key=lambda k: rows[k].fresh.value or 0.0, default=-1)


def solution_of(run: Run) -> Solve:
    """The results of task=solve; all unknown if the run has none."""
    return run.results.solve or Solve()


def solution_caption(run: Run) -> str:
    """A description of the columns, for table and figure."""
    fit = solution_of(run).fit
    on_members = [name for name, one in run.results.attacks.items() if any(value is not None for value in one.members)]
    alone = f"; members alone are attacked by {', '.join(on_members)}" if on_members else ""
    return (
        "Pool and fresh are robust accuracies. Pool: at the points that chose the weights "
        f"({fit.num_examples} validation images, {fit.num_attacks} responses of the attacker, {fit.status}). "
        "Fresh: on the same images under new attacks. "
        f"Test: {run.num_examples} test images. Attacks: {', '.join(run.results.attacks)}; every point is replayed "
        f"on all classifiers{alone}."
    )


def solution_sentences(run: Run) -> list[str]:
    """Sentences on the certificate, and on the paired differences on the test set."""
    solution = solution_of(run)
    known, rows = solution.certificate, solution.rows
    if known.value_lp is None or known.value_at_weights is None or len(rows) < 3:
        return []
    # Rounded in the safe direction: the upper bound up, the reached accuracy down.
    limit = math.ceil(1e4 * (1 - known.value_lp) - 1e-6) / 100
    reached = math.floor(1e4 * (1 - known.value_at_weights) + 1e-6) / 100
    apart = 100 * max(0.0, known.value_at_weights - known.value_lp)
    sentences = [
        f"Certain: on these {solution.fit.num_examples} validation images no weights over these members "
        f"have a robust accuracy above {limit:.2f} %, because the points found are real.",
        f"Estimate: the chosen weights have {reached:.2f} % against every point found there ({apart:.2f} points from "
        "the limit); stronger attacks may lower it.",
    ]
    # Copies with a bias are normalised as the member before them.
    plain = [one for one in run.results.members if not one.bias]
    notes = [f"{one.name}: {one.note}" for one in plain if one.note not in (None, "as exported")]
    if notes:
        sentences.append(f"Inputs: {'; '.join(notes)}.")
    if solution.fit.status == "stopped":
        sentences.append("The value had not converged after the last round: raise lambda_solver.num_rounds.")
    return [*sentences, *_differences(run, rows)]


def _differences(run: Run, rows: tuple[SolveRow, ...]) -> list[str]:
    """The optimal mixture against the uniform one, and against the member that is best on the validation images."""
    weights = run.results.weights
    try:
        found = measured(run)
    except ValueError as error:
        return [f"No paired differences: {error}."]
    best = best_on_validation(rows)
    sentences = []
    if 1.0 in weights:
        alone = rows[weights.index(1.0)].who
        sentences.append(f"The optimal weights are those of {alone} alone: mixing gains nothing here.")
    rivals = {}
    if found.members is not None and weights[best] < 1:
        rivals[f"best member on the validation images ({rows[best].who})"] = found.members[best]
    rivals |= {WHO[name]: right for name, right in found.counterparts.items()}
    if EVEN in found.accuracies:
        rivals["uniform mixture"] = found.accuracies[EVEN]
    for name, other in rivals.items():
        result = paired(found.accuracies[ALL] - other)
        verdict = result.verdict("the optimal mixture is more robust", "the optimal mixture is less robust")
        sentences.append(f"Test set: optimal mixture minus {name}: {result.in_words()}: {verdict}.")
    return sentences
