"""What runs of ``task=game`` say on the terminal, from their results.json."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mixadv.errors import UserError
from mixadv.report.cells import NONE, add_row, new_table, plain, print_whole
from mixadv.report.files import Run
from mixadv.report.names import short_names

ANEW = "run the game again with resume=never"
# What comes of results that are not what task=game writes.
DAMAGED = (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError)


def is_game(run: Run) -> bool:
    """Whether it is a run of ``task=game``, finished or not."""
    return (run.get("task") or run.config.get("task")) == "game"


def read_game(run: Run) -> dict[str, Any]:
    """The entry `game` of a finished run's results.json.

    Raises:
        UserError: the run has none.
    """
    game = _results(run)
    if game is None:
        raise UserError(f"{run.path} holds no results of task=game: {ANEW}")
    return game


def _results(run: Run) -> dict[str, Any] | None:
    game = run.get("game")
    return game if isinstance(game, dict) and game.get("name") in _PARTS else None


def print_game(run: Run, console: Console) -> None:
    """Print the values of a finished game: its table, the attacker's strategy or the order that was checked.

    Raises:
        UserError: the run has no results of a game.
    """
    game = read_game(run)
    try:
        parts = _PARTS[game["name"]](game)
    except DAMAGED as error:
        raise UserError(f"{run.path / 'results.json'} is damaged ({type(error).__name__}: {error}): {ANEW}") from error
    for part in parts:
        if isinstance(part, Table):
            print_whole(part, console)
        else:
            console.print(Text(part), soft_wrap=True)


def games_table(runs: Sequence[Run]) -> Table:
    """One row per run of ``task=game``, in the order given: its state and its values at the largest radius."""
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
        kind = run.config.get("game")
        try:
            cells = [NONE] * 4 if _results(run) is None else list(map(str, _at_largest_radius(read_game(run))))
        except DAMAGED:
            cells = ["damaged", NONE, NONE, NONE]
        add_row(table, [name, run.state, str(kind.get("name") if isinstance(kind, dict) else NONE), *cells])
    return table


def _at_largest_radius(game: dict[str, Any]) -> list[str]:
    if game["name"] == "motivating":
        exact = game["exact"]
        return [game["eps"], exact["dual"], exact["value"], min(exact["deterministic_risks"], key=Fraction)]
    eps = max(game["eps"])
    runs = [run for run in game["runs"] if run["eps"] == eps]
    return [f"{eps:g}", *(_mean([run[key] for run in runs]) for key in ("dual", "v_rand", "v_det"))]


def _motivating(game: dict[str, Any]) -> list[Table | str]:
    exact, solvers = game["exact"], game["solvers"]
    headings = ["", "exact", *(f"{solver['solver']}\n{solver['detail']}" for solver in solvers)]
    table = new_table(f"Two classifiers on the line, ε = {game['eps']}", headings, words=[""])
    for k in (0, 1):
        alone = [plain(solver["deterministic_risks"][k], ".4f") for solver in solvers]
        table.add_row(f"risk of f{k + 1} alone", exact["deterministic_risks"][k], *alone)
    for k in (0, 1):
        weights = [plain(solver["weights"][k], ".4f") for solver in solvers]
        table.add_row(f"best mixture, weight of f{k + 1}", exact["weights"][k], *weights)
    table.add_section()
    table.add_row("its risk, V_rand", exact["value"], *(plain(s["value"], ".4f") for s in solvers), style="bold")
    table.add_row("attacker's guarantee, D", exact["dual"], *(plain(s["dual"], ".4f") for s in solvers), style="bold")
    table.add_row("gap V_rand − D", exact["gap"], *(_tiny(s["gap"]) for s in solvers))
    table.add_row("D without randomness", exact["pure_attacker"], *[NONE] * len(solvers))
    lines = ["The attacker's optimal strategy:"]
    for point in game["attack"]:
        moves = [
            f"{'stays' if move['to'] == point['point'] else 'to ' + move['to']} with probability {move['probability']}"
            for move in point["moves"]
        ]
        lines.append(f"  label {point['label']:+d} at {point['point']}, mass {point['mass']}: {', '.join(moves)}")
    if any(solver["start"] is not None for solver in solvers):
        lines.append("Algorithm 1 and the entropic solver start at f1 alone; their D is a lower bound.")
    return [table, "\n".join(lines)]


def _gaussians(game: dict[str, Any]) -> list[Table | str]:
    seeds = game["seeds"]
    which = f"seeds {seeds[0]} to {seeds[-1]}, mean [min, max]" if len(seeds) > 1 else f"seed {seeds[0]}"
    table = new_table(
        f"{game['num_classifiers']} linear classifiers on three Gaussians, {which}",
        ["ε", "D", "V_rand", "V_det", "V_det − V_rand", "largest gap"],
        caption=f"{game['num_points']:,} points, {game['candidates_per_point']:,} perturbations each:\n"
        "lower estimates of the values on whole balls",
    )
    for eps in game["eps"]:
        runs = [run for run in game["runs"] if run["eps"] == eps]
        gains = [run["v_det"] - run["v_rand"] for run in runs]
        spread = f" [{_gain(min(gains))}, {_gain(max(gains))}]" if len(gains) > 1 else ""
        table.add_row(
            f"{eps:g}",
            *(_mean([run[key] for run in runs]) for key in ("dual", "v_rand", "v_det")),
            _gain(sum(gains) / len(gains)) + spread,
            _tiny(max(run["gap"] for run in runs)),
        )
    order, found = game["order"], game["convergence"]
    worst = _tiny(order["largest_violation"])
    checked = f"D ≤ V_rand ≤ V_det holds in all {order['games']} games (largest violation {worst})"
    if 0 in game["eps"]:
        checked += ", and V_rand = V_det at ε = 0"
    errors = [f"  {_solver(entry)}: {_tiny(entry['error'])}" for entry in found["solvers"]]
    title = (
        f"R(best weights) − V_LP after {found['solvers'][0]['steps']:,} steps at ε = {found['eps']:g} "
        f"({found['candidates_per_point']} perturbations per point, V_LP = {found['v_lp']:.4f}):"
    )
    return [table, checked + ".", "\n".join([title, *errors])]


_PARTS = {"motivating": _motivating, "gaussians": _gaussians}


def _solver(entry: dict[str, Any]) -> str:
    return entry["solver"] + ("" if entry["alpha"] is None else f", α = {entry['alpha']:g}")


def _tiny(value: float | None) -> str:
    if value is None:
        return NONE
    return "0" if abs(value) < 1e-15 else f"{value:.1e}"


def _mean(values: list[float]) -> str:
    # Equal values must not look different because rounding put them on either side of a half.
    return f"{round(sum(values) / len(values), 9):.4f}"


def _gain(value: float) -> str:
    # Rounding must not print a minus zero.
    return f"{max(value, 0.0):.4f}"
