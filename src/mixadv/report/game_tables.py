"""Tables of runs of ``task=game``, whose results (`Results.played`) differ from game to game."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixadv.errors import UserError
from mixadv.report.cells import NONE, add_row, new_table, print_whole
from mixadv.report.files import Run
from mixadv.report.names import group_name, short_names

# Deterministic classifiers that are no members: keys of a run -> headings, and words.
COUNTERPARTS = {"best_constant": "constant", "best_vote": "vote"}
WORDS = {"best_constant": "a constant answer", "best_vote": "a vote of the members"}
ANEW = "run the game again with resume=never"
# Raised when the results have not the form that task=game writes.
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)


def is_game(run: Run) -> bool:
    """Whether this is a run of ``task=game``, finished or not."""
    return run.task == "game"


def read_game(run: Run) -> dict[str, Any]:
    """The results of a finished game.

    Raises:
        UserError: the run has none.
    """
    if run.results.played is None:
        raise UserError(f"{run.path} holds no results of task=game: {ANEW}")
    return run.results.played


@contextmanager
def damage_named(run_dir: Path) -> Iterator[None]:
    """Turn the exceptions of damaged results into a `UserError` that names the run."""
    try:
        yield
    except DAMAGED as error:
        raise UserError(
            f"the results of the game in {run_dir} are damaged ({type(error).__name__}: {error}): {ANEW}"
        ) from error


def print_game(run: Run, console: Console) -> None:
    """Print the table of a finished game, and the attacker's strategy or the check D <= V_rand <= V_det.

    Raises:
        UserError: the run has no results of a game.
    """
    game = read_game(run)
    with damage_named(run.path):
        table, lines = {"motivating": _motivating, "gaussians": _gaussians}.get(game["name"], _any_game)(game)
    print_whole(table, console)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def games_table(runs: Sequence[Run]) -> Table:
    """One row per run of ``task=game``, in the given order: state, and values at the largest radius."""
    words = ("run", "state", "game")
    table = new_table(
        f"{len(runs)} games",
        [*words, "ε", "D", "V_rand", "V_det"],
        words=words,
        folds=dict.fromkeys(words, 1),
        box=SIMPLE_HEAD,
        pad_edge=False,
    )
    for name, run in zip(short_names([run.path for run in runs]), runs, strict=True):
        try:
            cells = _at_largest_radius(read_game(run))
        except UserError:
            cells = [NONE] * 4
        except DAMAGED:
            cells = ["damaged", NONE, NONE, NONE]
        add_row(table, [name, run.state, group_name(run.config.get("game")) or NONE, *map(str, cells)])
    return table


def _at_largest_radius(game: dict[str, Any]) -> list[str]:
    if game["name"] == "motivating":
        exact = game["exact"]
        return [game["eps"], exact["dual"], exact["value"], min(exact["deterministic_risks"], key=Fraction)]
    eps, runs = list(runs_by_radius(game).items())[-1]
    return [f"{eps:g}", *(_mean(runs, key) for key in ("dual", "v_rand", "v_det"))]


def runs_by_radius(game: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """Radius, ascending -> its entries, one for each draw."""
    radii = sorted({run["eps"] for run in game["runs"]})
    return {eps: [run for run in game["runs"] if run["eps"] == eps] for eps in radii}


def _motivating(game: dict[str, Any]) -> tuple[Table, list[str]]:
    exact, solvers = game["exact"], game["solvers"]
    headings = ["", "exact", *(f"{solver['solver']}\n{solver['detail']}" for solver in solvers)]
    table = new_table(f"Two classifiers on the line, ε = {game['eps']}", headings, words=[""])
    for key, label in (("deterministic_risks", "risk of f{} alone"), ("weights", "best mixture, weight of f{}")):
        for k in (0, 1):
            table.add_row(label.format(k + 1), exact[key][k], *(f"{solver[key][k]:.4f}" for solver in solvers))
    table.add_section()
    for key, label in (("value", "its risk, V_rand"), ("dual", "attacker's guarantee, D")):
        table.add_row(label, exact[key], *(f"{solver[key]:.4f}" for solver in solvers), style="bold")
    table.add_row("gap V_rand − D", exact["gap"], *(_tiny(solver["gap"]) for solver in solvers))
    table.add_row("D without randomness", exact["pure_attacker"], *[NONE] * len(solvers))
    lines = ["The attacker's optimal strategy:"]
    for point in game["attack"]:
        moves = [
            f"{'stays' if move['to'] == point['point'] else 'to ' + move['to']} with probability {move['probability']}"
            for move in point["moves"]
        ]
        lines.append(f"  label {point['label']:+d} at {point['point']}, mass {point['mass']}: {', '.join(moves)}")
    return table, [*lines, "Algorithm 1 and the entropic solver start at f1 alone; their D is a lower bound."]


def _any_game(game: dict[str, Any], title: str = "", caption: str = "") -> tuple[Table, list[str]]:
    """The values at every radius, for any game with the entries of `played["runs"]`."""
    draws = len({run["draw"] for run in game["runs"]})
    others = [(key, label) for key, label in COUNTERPARTS.items() if all(key in run for run in game["runs"])]
    gain = ["V_det\n−V_rand", *["least–most"] * (draws > 1)]
    headings = ["ε", "D", "V_rand", "V_det", *gain, *(label for _, label in others), "largest\ngap"]
    look: dict[str, Any] = {"box": SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    which = f"means of {draws} draws" if draws > 1 else "one draw"
    table = new_table(f"{title or game['name']}, {which}", headings, caption=caption, **look)
    for eps, runs in runs_by_radius(game).items():
        # Without the maximum a rounding error prints as -0.0000.
        gains = [max(run["v_det"] - run["v_rand"], 0.0) for run in runs]
        cells = [_mean(runs, key) for key in ("dual", "v_rand", "v_det")]
        cells += [f"{sum(gains) / len(gains):.4f}", *[f"{min(gains):.3f}–{max(gains):.3f}"] * (draws > 1)]
        cells += [_mean(runs, key) for key, _ in others]
        table.add_row(f"{eps:g}", *cells, _tiny(max(run["gap"] for run in runs)))
    worst = _tiny(max(run["violation"] for run in game["runs"]))
    lines = [f"D ≤ V_rand ≤ V_det holds in all {len(game['runs'])} games (largest violation {worst})."]
    return table, lines + [_against_counterparts(game["runs"])] * bool(others)


def _against_counterparts(runs: list[dict[str, Any]]) -> str:
    """Where mixing helps: how often one deterministic classifier, which is no member, is better still."""
    pays = [run for run in runs if run["v_det"] - run["v_rand"] > 1e-3]
    if not pays:
        return "Mixing gains nothing in these games."
    better = {key: sum(run[key] < run["v_rand"] - 1e-7 for run in pays) for key in COUNTERPARTS if key in pays[0]}
    said = ", ".join(f"{WORDS[key]} in {count}" for key, count in better.items())
    return (
        f"The best mixture beats the best member by more than 0.001 in {len(pays)} games. One deterministic classifier "
        f"beats it there too: {said}."
    )


def _gaussians(game: dict[str, Any]) -> tuple[Table, list[str]]:
    samples = game["num_samples"]
    attacker = "the attacker has whole balls" if samples is None else f"the attacker has {samples:,} points per ball"
    table, lines = _any_game(
        game,
        f"{game['num_classifiers']} linear classifiers on three Gaussians",
        f"Error rates on {game['num_points']:,} points; {attacker}"
        + ("." if samples is None else ":\nlower estimates of the values on whole balls."),
    )
    if 0 in game["eps"]:
        lines.append("V_rand = V_det at ε = 0, as it must be.")
    found = game["convergence"]
    lines.append(
        f"R(best weights) − V_LP after {found['solvers'][0]['steps']:,} steps at ε = {found['eps']:g} "
        f"(first draw, V_LP = {found['v_lp']:.4f}):"
    )
    for entry in found["solvers"]:
        solver = entry["solver"] + ("" if entry["alpha"] is None else f", α = {entry['alpha']:g}")
        lines.append(f"  {solver}: {_tiny(entry['error'])}")
    return table, lines


def _tiny(value: float) -> str:
    return "0" if abs(value) < 1e-15 else f"{value:.1e}"


def _mean(runs: list[dict[str, Any]], key: str) -> str:
    # Rounded first: equal values with other rounding errors must print alike.
    return f"{round(sum(run[key] for run in runs) / len(runs), 9):.4f}"
