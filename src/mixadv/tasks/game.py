"""``task=game``: a built-in game solved exactly, checked against the theory, and drawn."""

import os
import platform
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from mixadv.console import Console
from mixadv.errors import UserError
from mixadv.games.gaussians import GaussianProblem, draw_problem, entropic_trace, oracle_errors
from mixadv.games.motivating import ExactSolution, LineGame
from mixadv.games.values import TOLERANCE, solve_values
from mixadv.lambda_solvers import AcceleratedEntropic, LinearProgram, OracleSubgradient
from mixadv.report.figures.games import draw_game
from mixadv.results import Results
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.tasks.game_settings import GaussianSettings, MotivatingSettings, game_settings
from mixadv.tasks.measure import provenance

Played = tuple[dict[str, Any], dict[str, np.ndarray]]

# The iterative solvers of the motivating game start at f1 alone: at 1/L they would stand on the solution.
START = (1.0, 0.0)


def play_game(cfg: DictConfig, run_dir: Path, state: State) -> None:
    """Solve ``cfg.game`` in `run_dir`; from the start, where an earlier try was interrupted.

    Writes config.yaml, game.npz (the arrays of the figure), results.json, game.png and DONE.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).

    Raises:
        UserError: settings of the game that cannot work, said before anything is computed.
    """
    console = Console()
    settings = game_settings(cfg)
    started = time.perf_counter()
    # The draw may fail for want of good classifiers, so it comes before anything is written.
    problem = _draw(settings, cfg.seed) if isinstance(settings, GaussianSettings) else None
    write_config(run_dir, cfg)
    verb = "Starting again in" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    if isinstance(settings, GaussianSettings):
        assert problem is not None
        game, arrays = _play_gaussians(settings, cfg.seed, problem, console)
    else:
        game, arrays = _play_motivating(settings)
    facts = provenance()
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    results = Results(
        task="game",
        seed=cfg.seed,
        device=f"cpu ({platform.machine()}, {torch.get_num_threads()} threads)",
        versions={**facts["versions"], "scipy": version("scipy")},
        git=facts["git"],
        config=config,
        played={"name": settings.name, **game},
        flags=(),
        seconds={"total": round(time.perf_counter() - started, 3)},
    )
    write_results(run_dir, results, arrays, "game.npz")
    draw_game(run_dir)
    mark_done(run_dir)


def _play_motivating(settings: MotivatingSettings) -> Played:
    line = LineGame(settings.eps)
    exact = line.solve()
    game = line.finite_game()
    values = solve_values(game)
    if exact.gap != 0 or abs(values.v_rand - float(exact.value)) > TOLERANCE:
        raise RuntimeError(f"V = {exact.value}, D = {exact.dual} in fractions, but {values.v_rand!r} by linear program")
    alone = game.deterministic_values().tolist()
    solvers = []
    steps, alpha = settings.num_steps, settings.alpha
    for name, detail, solver in (
        ("LP", "HiGHS", LinearProgram()),
        ("Algorithm 1", f"{steps:,} steps", OracleSubgradient(num_steps=steps)),
        ("entropic", f"α = {alpha:g}", AcceleratedEntropic(alpha=alpha, num_steps=steps)),
    ):
        start = None if isinstance(solver, LinearProgram) else torch.tensor(START, dtype=torch.float64)
        found = solver.solve(game, lam0=start)
        solvers.append(
            {
                "solver": name,
                "detail": detail,
                "start": None if start is None else list(START),
                "deterministic_risks": alone,
                "weights": found.weights.tolist(),
                "value": found.value,
                "dual": found.lower_bound,
                "gap": found.gap,
                "status": found.status,
            }
        )
    attack = [
        {
            "point": str(point),
            "label": label,
            "mass": str(mass),
            "moves": [{"to": str(move.to), "probability": str(move.probability)} for move in moves],
        }
        for point, label, mass, moves in zip(line.points, line.labels, line.masses, exact.attack, strict=True)
    ]
    summary = {"eps": str(line.eps), "exact": _in_fractions(exact), "attack": attack, "solvers": solvers}
    return summary, {
        "curve": np.array([[float(first), float(risk)] for first, risk in exact.curve]),
        "thresholds": np.array([[float(at), side] for at, side in line.classifiers]),
    }


def _in_fractions(exact: ExactSolution) -> dict[str, Any]:
    pairs = {"deterministic_risks": exact.deterministic_risks, "weights": exact.weights}
    numbers = {name: str(getattr(exact, name)) for name in ("value", "dual", "gap", "pure_attacker")}
    return {name: [str(part) for part in pair] for name, pair in pairs.items()} | numbers


def _play_gaussians(settings: GaussianSettings, seed: int, first: GaussianProblem, console: Console) -> Played:
    radii, show_eps = settings.eps, settings.show_eps
    seeds = list(range(seed, seed + settings.seeds))
    runs: list[dict[str, Any]] = []
    show_weights = np.zeros(0)
    for number in seeds:
        began = time.perf_counter()
        problem = first if number == seed else _draw(settings, number)
        for eps in sorted({*radii, show_eps}) if number == seed else radii:
            values = solve_values(problem.game(eps))
            if eps == 0 and abs(values.v_rand - values.v_det) > TOLERANCE:
                raise RuntimeError(f"at eps = 0, V_rand = {values.v_rand!r} differs from V_det = {values.v_det!r}")
            if number == seed and eps == show_eps:
                show_weights = values.weights.numpy()
            if eps in radii:
                runs.append({"seed": number, "eps": eps, **vars(values), "weights": values.weights.tolist()})
        took = time.perf_counter() - began
        console.print(f"seed {number}: {len(radii)} radii solved in {took:.1f} s", highlight=False)
    convergence, arrays = _converge(settings, first, show_eps, console)
    shape = (len(seeds), len(radii))
    arrays |= {name: np.array([run[name] for run in runs]).reshape(shape) for name in ("v_rand", "v_det", "dual")}
    arrays |= {
        "eps": np.array(radii),
        "points": first.x.numpy(),
        "labels": first.y.numpy(),
        "normals": first.normals.numpy(),
        "offsets": first.offsets.numpy(),
        "weights": show_weights,
    }
    summary = {
        "seeds": seeds,
        "eps": radii,
        "show_eps": show_eps,
        "num_points": settings.num_points,
        "candidates_per_point": settings.num_samples + 1,
        "num_classifiers": settings.num_classifiers,
        "risks": first.risks().tolist(),
        "runs": runs,
        "order": {"games": len(runs), "largest_violation": max(run["violation"] for run in runs)},
        "convergence": convergence,
    }
    return summary, arrays


def _converge(settings: GaussianSettings, problem: GaussianProblem, eps: float, console: Console) -> Played:
    """Algorithm 1 and the entropic solver against the linear program, on the first perturbations of each ball."""
    game = replace(problem, steps=problem.steps[:, : 1 + settings.convergence_samples]).game(eps)
    value = solve_values(game).v_rand
    steps = np.unique(np.geomspace(1, settings.num_steps, 13).round().astype(int))
    began = time.perf_counter()
    errors = oracle_errors(game, value, steps.tolist())
    console.print(f"Algorithm 1 up to {steps[-1]:,} steps in {time.perf_counter() - began:.1f} s", highlight=False)
    solvers = [{"solver": "Algorithm 1", "alpha": None, "steps": int(steps[-1]), "error": errors[-1]}]
    traces = []
    for alpha in settings.alphas:
        began = time.perf_counter()
        trace = entropic_trace(game, value, alpha, settings.num_steps)
        took = time.perf_counter() - began
        console.print(f"entropic solver, α = {alpha:g}, {settings.num_steps:,} steps in {took:.1f} s", highlight=False)
        traces.append(trace)
        solvers.append(
            {"solver": "entropic", "alpha": alpha, "steps": settings.num_steps, "error": trace.value_errors[-1]}
        )
    summary = {"eps": eps, "candidates_per_point": settings.convergence_samples + 1, "v_lp": value, "solvers": solvers}
    return summary, {
        "oracle_steps": steps,
        "oracle_errors": np.array(errors),
        "alphas": np.array(settings.alphas),
        "value_errors": np.array([trace.value_errors for trace in traces]),
        "smoothed_errors": np.array([trace.smoothed_errors for trace in traces]),
        "certificates": np.array([trace.certificate for trace in traces]),
    }


def _draw(settings: GaussianSettings, seed: int) -> GaussianProblem:
    try:
        sizes = (settings.num_points, settings.num_samples, settings.num_classifiers)
        return draw_problem(torch.Generator().manual_seed(seed), *sizes, settings.max_risk)
    except ValueError as error:
        raise UserError(f"seed {seed}: game.{error}") from error
