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
from mixadv.wording import counted

# Deterministic classifiers that are no members: keys of a run -> headings, and words.
COUNTERPARTS = {"best_constant": "constant", "best_vote": "vote"}
WORDS = {"best_constant": "a constant answer", "best_vote": "a vote of the members"}
# Members and moves that the table of a user's own losses shows.
MOST_MEMBERS, MOST_MOVES = 20, 12
NO_FRACTIONS = "No fractions: these are found for at most 20,000 losses with denominators up to 10,000."
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
        table, lines = TABLES.get(game["name"], _any_game)(game)
    print_whole(table, console)
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def games_table(runs: Sequence[Run]) -> Table:
    """One row per run of ``task=game``, in the given order: state, and values at the largest radius."""
    words = ("run", "state", "game")
    table = new_table(
        counted(len(runs), "game"),
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
    if exact := game.get("exact"):
        return [game.get("eps", NONE), *(exact[key] for key in ("dual", "value")), _least(exact)]
    if game["name"] == "table":
        return [NONE, *(_mean(game["runs"], key) for key in ("dual", "v_rand", "v_det"))]
    eps, runs = list(runs_by_radius(game).items())[-1]
    return [f"{eps:g}", *(_mean(runs, key) for key in ("dual", "v_rand", "v_det"))]


def runs_by_radius(game: dict[str, Any]) -> dict[float, list[dict[str, Any]]]:
    """Radius, ascending -> its entries, one for each draw."""
    radii = sorted({run["eps"] for run in game["runs"]})
    return {eps: [run for run in game["runs"] if run["eps"] == eps] for eps in radii}


def constant_risk(game: dict[str, Any]) -> Fraction:
    """The risk of the best constant answer in the motivating example: the mass of the other label."""
    masses = {label: Fraction(0) for label in (-1, 1)}
    for point in game["attack"]:
        masses[point["label"]] += Fraction(point["mass"])
    return min(masses.values())


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
    lines.append(f"A constant answer, which is neither of the two classifiers, has the risk {constant_risk(game)}.")
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
    games = counted(len(game["runs"]), "game")
    held = f"all {games}" if len(game["runs"]) > 1 else games
    lines = [f"D ≤ V_rand ≤ V_det holds in {held} (largest violation {worst})."]
    return table, lines + [_against_counterparts(game["runs"])] * bool(others)


def _against_counterparts(runs: list[dict[str, Any]]) -> str:
    """Where mixing helps: how often one deterministic classifier, which is no member, is better still."""
    pays = [run for run in runs if run["v_det"] - run["v_rand"] > 1e-3]
    if not pays:
        return "Mixing gains nothing in these games."
    better = {key: sum(run[key] < run["v_rand"] - 1e-7 for run in pays) for key in COUNTERPARTS if key in pays[0]}
    said = ", ".join(f"{WORDS[key]} in {count}" for key, count in better.items())
    return (
        f"The best mixture beats the best member by more than 0.001 in {counted(len(pays), 'game')}. There, a "
        f"deterministic classifier that is no member beats the mixture: {said}."
    )


def _triangle(game: dict[str, Any]) -> tuple[Table, list[str]]:
    exact = game["exact"]
    table = new_table(
        f"Three classes that conflict, ε = {game['eps']} of their distance",
        ["under attack, exact", "error rate", "accuracy"],
        words=["under attack, exact"],
    )
    risks = {}
    if len(game["regions"]) == 3:
        risks["f1, one class in each overlap"] = exact["deterministic_risks"][0]
        risks["f2, the other class in each overlap"] = exact["deterministic_risks"][1]
    risks["best deterministic classifier, V_det"] = _least(exact)
    mixed = "f1 or f2 by a fair coin, best mixture" if len(game["regions"]) == 3 else "best mixture"
    risks[f"{mixed}, V_rand"] = exact["value"]
    for what, risk in risks.items():
        add_row(table, [what, risk, str(1 - Fraction(risk))])
    table.add_section()
    add_row(table, ["attacker's guarantee, D", exact["dual"], str(1 - Fraction(exact["dual"]))])
    return table, _what_the_radius_allows(game)


def _what_the_radius_allows(game: dict[str, Any]) -> list[str]:
    if not game["regions"]:
        return ["No two balls meet below ε = 1/2: one classifier is right on all of them."]
    if len(game["regions"]) == 3:
        return [
            "Each pair of balls overlaps, the three have no common point (1/2 ≤ ε < 1/√3): a deterministic classifier",
            "must give each overlap to one class, a random one can share it.",
            "The attacker's optimal strategy: each point to either of its two overlaps with probability 1/2.",
        ]
    return [
        "The three balls have a common point (ε ≥ 1/√3 = 0.577…): the attacker moves every point there, and no answer",
        "there is right for more than one class. Randomising gains nothing.",
    ]


def _table(game: dict[str, Any]) -> tuple[Table, list[str]]:
    exact, (run,) = game["exact"], game["runs"]
    size = f"{game['examples']:,} × " * (game["examples"] > 1) + f"{game['perturbations']:,} × {len(game['members']):,}"
    headings = ["", *["exact"] * bool(exact), "LP\nHiGHS"]
    table = new_table(f"The game in {game['file']}: {size} losses", headings, words=[""])
    names = dict(enumerate(game["members"]))
    if len(names) > MOST_MEMBERS:
        by_weight = sorted(names, key=lambda k: (-run["weights"][k], game["deterministic_risks"][k]))
        names = {k: names[k] for k in by_weight[:MOST_MEMBERS]}
    for key, label, floats in (
        ("deterministic_risks", "risk of {} alone", game["deterministic_risks"]),
        ("weights", "best mixture, weight of {}", run["weights"]),
    ):
        for k, name in names.items():
            add_row(table, [label.format(name), *[exact[key][k] for _ in headings[2:]], f"{floats[k]:.4f}"])
    table.add_section()
    for key, label, name in (("value", "its risk, V_rand", "v_rand"), ("dual", "attacker's guarantee, D", "dual")):
        add_row(table, [label, *[exact[key] for _ in headings[2:]], f"{run[name]:.4f}"], style="bold")
    add_row(table, ["gap V_rand − D", *[exact["gap"] for _ in headings[2:]], _tiny(run["gap"])])
    lines = [] if exact else [NO_FRACTIONS]
    if len(game["members"]) > len(names):
        lines.append(f"The {len(names)} members with the largest weights; results.json has all {len(game['members'])}.")
    lines.append("The attacker's optimal strategy:")
    moves = [move for move in game["moves"] if move["probability"] > 1e-9][:MOST_MOVES]
    for move in moves:
        where = f"example {move['example']} (mass {move['mass']:.4g}): " if game["examples"] > 1 else ""
        lines.append(f"  {where}move {move['move']} with probability {move['probability'] / move['mass']:.4f}")
    if game["played_moves"] > len(moves):
        lines.append(f"  and {game['played_moves'] - len(moves):,} more moves, in game.npz")
    return table, lines


def _of_points(game: dict[str, Any], norm: str = "") -> str:
    """What the values of a game on points in the plane are: exact on whole balls, or lower estimates on samples."""
    on = f"Error rates on {game['num_points']:,} points; the attacker has"
    if game["num_samples"] is None:
        return f"{on} whole balls{norm}."
    return f"{on} {game['num_samples']:,} points per ball{norm}:\nlower estimates of the values on whole balls."


def _points(game: dict[str, Any]) -> tuple[Table, list[str]]:
    table, lines = _any_game(
        game,
        f"{len(game['members'])} classifiers on the points of {game['file']}",
        _of_points(game, f" ({game['norm']})"),
    )
    lines.append(f"The best mixture at ε = {game['show_eps']:g}:")
    for name, weight, risk in zip(game["members"], game["weights"], game["deterministic_risks"], strict=True):
        if weight > 1e-9:
            lines.append(f"  {name} with probability {weight:.4f} (alone its error rate is {risk:.4f})")
    return table, lines


def _least(exact: dict[str, Any]) -> str:
    return min(exact["deterministic_risks"], key=Fraction)


def _gaussians(game: dict[str, Any]) -> tuple[Table, list[str]]:
    table, lines = _any_game(
        game,
        f"{game['num_classifiers']} linear classifiers on three Gaussians",
        _of_points(game),
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


# By the name of the game; others are shown by the values at every radius.
TABLES = {"motivating": _motivating, "gaussians": _gaussians, "triangle": _triangle, "table": _table, "points": _points}
