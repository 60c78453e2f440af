"""How the cost of a batch grows: with members L, images B, attack steps K, and in the weights' games with N and m.

A training batch (schedule shared: attack and update of all members; sampled: attack and update of one) and a weights
phase (one best response: an attack that keeps its best point, and the losses there) are timed beside the cost model of
docs/performance.md, in forward passes: forward 1, backward to the input 1, backward to the parameters 2. The model is
set to the measured time at one point of each curve and predicts the rest. Games are [N, m, L], solved by each solver
to the end of its default steps (Algorithm 1: 200, entropic: 200).

    python benchmarks/scaling.py [--model small_resnet] [--repeats 5] [--quick]
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from harness import describe, interleaved, results_folder, save, summary, table
from torch import nn
from training_job import BALL, CLASSES, SHAPE

from mixadv.attacks.pgd import PGD
from mixadv.game import FiniteGame
from mixadv.lambda_solvers import AcceleratedEntropic, LinearProgram, OracleSubgradient
from mixadv.losses import AT
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.models import build_member
from mixadv.report.figures.style import (
    CLEAN_COLOUR,
    DASHES,
    MEMBER_COLOURS,
    ROBUST_COLOUR,
    VALUE_COLOUR,
    footnote,
    new_figure,
)
from mixadv.report.figures.style import save as save_figure

KINDS = ("shared", "sampled", "weights")
COLOURS = {"shared": CLEAN_COLOUR, "sampled": ROBUST_COLOUR, "weights": VALUE_COLOUR}
LABELS = {"shared": "batch, shared", "sampled": "batch, sampled", "weights": "a best response for the weights"}
BASE = {"L": 2, "B": 64, "K": 10}
SOLVERS = {
    "linear program": LinearProgram(),
    "Algorithm 1, 200 steps": OracleSubgradient(200),
    "entropic, 200 steps": AcceleratedEntropic(num_steps=200),
}


def forwards(kind: str, at: dict[str, int]) -> float:
    """The cost model of AT: forward passes of one member on one image."""
    members, steps = at["L"], at["K"]
    each = {
        "shared": members * (2 * steps + 3),
        "sampled": 2 * members * steps + 3,
        "weights": members * (2 * steps + 3),
    }
    return at["B"] * each[kind]


def runs_at(model: str, at: dict[str, int], device: torch.device) -> dict[str, Callable[[], object]]:
    """The three phases on one batch, eager."""
    torch.manual_seed(0)
    members = [build_member(model, num_classes=CLASSES, image_shape=SHAPE) for _ in range(at["L"])]
    mixture = Mixture(members).to(device)
    x, y = torch.rand(at["B"], *SHAPE, device=device), torch.randint(CLASSES, (at["B"],), device=device)
    climb, search = PGD(at["K"], keep="last"), PGD(at["K"], keep="objective")
    optimizers = [torch.optim.SGD(member.parameters(), lr=1e-4, momentum=0.9) for member in members]
    game = MixtureGame(mixture, x, y, BALL, [search], AT())

    def update(chosen: int) -> None:
        x_adv = climb(mixture, x, y, BALL)
        for member, optimizer in list(zip(members, optimizers, strict=True))[:chosen]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(member.train()(x_adv), y).backward()
            optimizer.step()

    def respond() -> None:
        game.best_response(mixture.weights)

    return {"shared": lambda: update(at["L"]), "sampled": lambda: update(1), "weights": respond}


def curve(args: argparse.Namespace, axis: str, values: list[int], device: torch.device) -> list[dict[str, Any]]:
    """Seconds of the three phases against one of L, B, K, the others as in `BASE`."""
    runs = {(kind, v): run for v in values for kind, run in runs_at(args.model, args.base | {axis: v}, device).items()}
    found = summary(interleaved(runs, args.repeats, 1, device))
    reference = values[len(values) // 2]
    rows = []
    for (kind, v), took in found.items():
        unit = found[kind, reference]["median"] / forwards(kind, args.base | {axis: reference})
        predicted = unit * forwards(kind, args.base | {axis: v})
        row = {"axis": axis, "at": v, "what": kind, "ms": 1e3 * took["median"], "spread": took["spread"]}
        rows.append(row | {"model ms": 1e3 * predicted, "measured/model": took["median"] / predicted})
    return rows


def games(args: argparse.Namespace, axis: str, values: list[int]) -> list[dict[str, Any]]:
    """Seconds of each solver on games with random losses, against one of N, m, L."""
    rows = []
    for value in values:
        at = {"N": 512, "m": 16, "L": 4} | {axis: value}
        torch.manual_seed(0)
        game = FiniteGame(torch.rand(at["N"], at["m"], at["L"]))
        runs = {name: lambda s=solver, g=game: s.solve(g) for name, solver in SOLVERS.items()}
        for name, took in summary(interleaved(runs, args.repeats, 1)).items():
            rows.append({"axis": axis, "at": value, "what": name, "ms": 1e3 * took["median"], "spread": took["spread"]})
    return rows


def draw(rows: list[dict[str, Any]], args: argparse.Namespace, machine: str) -> Any:
    """Six panels: the phases against L, B and K with the cost model, the solvers against N, m and L."""
    from matplotlib.ticker import LogFormatter

    figure = new_figure(9.4, f"Cost of a batch and of a game: {args.model}, 3x32x32")
    shown = {
        "L": "members L",
        "B": "images in a batch B",
        "K": "attack steps K",
        "N": "examples N of a game",
        "m": "points m for each example",
        "members": "members L of a game",
    }
    for i, (axis, label) in enumerate(shown.items()):
        left, bottom = 0.06 + 0.325 * (i % 3), 0.615 if i < 3 else 0.185
        axes = figure.add_axes((left, bottom, 0.26, 0.305))
        curves = [row for row in rows if row["axis"] == axis]
        for j, what in enumerate(dict.fromkeys(row["what"] for row in curves)):
            x, y, model = zip(
                *[(r["at"], r["ms"], r.get("model ms")) for r in curves if r["what"] == what], strict=True
            )
            colour = COLOURS.get(what, MEMBER_COLOURS[j])
            axes.plot(x, y, marker="o", color=colour, linestyle=DASHES[j], label=LABELS.get(what, what))
            if model[0] is not None:
                axes.plot(x, model, "x", color=colour, markersize=10, markeredgewidth=2)
        axes.set_xlabel(label)
        if i % 3 == 0:
            axes.set_ylabel("milliseconds")
            axes.yaxis.set_label_coords(-0.15, 0.5)
        if axis in ("N", "m", "B"):
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            for each in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
                each(LogFormatter(minor_thresholds=(1.5, 0.5)))
            axes.set_xticks(x, [str(value) for value in x])
        else:
            axes.set_ylim(bottom=0)
            axes.set_xticks(x)
        if i == 1:
            axes.plot([], [], "x", color="#444444", markersize=10, markeredgewidth=2, label="cost model")
        if i % 3 == 1:
            axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncols=4, handlelength=2.6)
    base = ", ".join(f"{key} = {value}" for key, value in args.base.items())
    footnote(
        figure,
        f"Where not on the axis {base}; games N = 512, m = 16, L = 4, uniform losses. Medians. {machine}.",
    )
    return figure


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="small_resnet")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="few small points, two repeats")
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    axes = {"L": [1, 2, 3, 4, 6, 8], "B": [16, 32, 64, 128, 256], "K": [1, 5, 10, 20, 40]}
    of_games = {"N": [128, 512, 2048, 8192], "m": [4, 16, 64, 256], "members": [2, 4, 6, 8]}
    args.base = BASE
    if args.quick:
        args.base, args.repeats = {"L": 2, "B": 8, "K": 3}, min(2, args.repeats)
        axes = {"L": [1, 2, 4], "B": [4, 8, 16], "K": [1, 3, 6]}
        of_games = {axis: values[:2] for axis, values in of_games.items()}
    machine = describe()
    print(machine)
    rows = [row for axis, values in axes.items() for row in curve(args, axis, values, device)]
    table(rows)
    solved = []
    for axis, values in of_games.items():
        solved += [row | {"axis": axis} for row in games(args, "L" if axis == "members" else axis, values)]
    print()
    table(solved)
    save("scaling", rows + solved, vars(args))
    print(
        save_figure(lambda: draw(rows + solved, args, machine.partition(", load")[0]), results_folder() / "scaling.png")
    )


if __name__ == "__main__":
    main()
