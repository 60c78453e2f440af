"""``task=solve``: the optimal weights over classifiers that exist already."""

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixadv import records
from mixadv.attacks.search import Attack
from mixadv.errors import UserError
from mixadv.evaluation import (
    EvaluationRecord,
    choose,
    counterparts_of,
    equilibrium_of,
    evaluate,
    flags_of_record,
    pool_of,
)
from mixadv.evaluation.record import accuracy_of
from mixadv.game import Equilibrium, FiniteGame
from mixadv.lambda_solvers import LambdaSolver
from mixadv.losses import ZeroOne
from mixadv.members.source import LoadedMember, Source
from mixadv.members.store import save_mixture
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.report import Run, draw_regions, draw_solution
from mixadv.results import Accuracy, Certificate, Data, Fit, GameValue, History, Solve, SolveRow
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.seeding import derive_seed, generator_for
from mixadv.simplex import uniform
from mixadv.tasks import build, speed
from mixadv.tasks.card import solved_card
from mixadv.tasks.logging_to import build_loggers, log_results, logging_to
from mixadv.tasks.members import biases_of, flags_of_other_splits, load_members, named_results, with_copies
from mixadv.tasks.provenance import header_of, settings_of
from mixadv.tasks.regions import keep_regions
from mixadv.tasks.session import Session, as_finished
from mixadv.training import WeightsPhase


class Weighed(NamedTuple):
    """The solution, the finite game on all points that the attacks found for it, and seconds."""

    solution: Equilibrium
    game: FiniteGame
    seconds: float


def solve_weights(cfg: DictConfig, run_dir: Path, state: State, *, sweep: str | None, sources: Sequence[Source]) -> Run:
    """Weigh the members of `sources` on validation images, and measure the mixture on the test set.

    The weights are those of the game whose payoff is the 0/1 loss and whose best response is every attack of the
    protocol; ``cfg.lambda_solver`` solves it. The test set is used once, for the table.

    With ``cfg.biases`` the game also has copies of every member with other biases on its logits. These are many, and
    most get no weight, so the members of positive weight alone are exported.

    Args:
        cfg: the checked configuration.
        run_dir: claimed; `state` is what it holds.
        sweep: name of the sweep this run belongs to.
        sources: the entries of ``members=[...]``.

    Returns:
        The finished run.

    Raises:
        UserError: members that cannot be loaded, or do not fit one another or the data.
    """
    started = time.perf_counter()
    solver = build.build_solver(cfg)
    if not solver.adapts:
        raise UserError("lambda_solver=uniform solves nothing: use lp, oracle or entropic (1/L is in the table anyway)")
    if build.build_phase(cfg) != WeightsPhase():
        raise UserError(
            f"lambda_solver.{', lambda_solver.'.join(build.PHASE)} are for task=train: task=solve plays the 0/1 loss "
            "on all validation images with every attack of the protocol; leave them out"
        )
    attacks, loggers = build.build_protocol(cfg), build_loggers(cfg, run_dir, sweep)
    session = Session.begin(cfg, run_dir)
    biases = biases_of(cfg, session.data)
    x, y = _validation_images(session)
    if solver.num_examples not in (None, len(y)):
        raise UserError(
            f"lambda_solver.alpha has {solver.num_examples} temperatures, but the validation split has {len(y)} "
            "images: give one for each, or one number for all"
        )
    members = with_copies(load_members(session, sources, x[:8]), biases)
    if len(members) < 2:
        raise UserError(
            "members=[...] holds one classifier: there is nothing to weigh, name two or more, or weigh it with copies "
            "that prefer some classes, biases=[0.1,0.3,1]"
        )
    mixture = Mixture([member.module for member in members]).to(session.device)
    write_config(run_dir, cfg)
    verb = "Starting again in" if state is State.UNFINISHED else "Writing to"
    session.console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    speed.compile_for_evaluation(session, mixture)

    weighed = _play(session, mixture, attacks, solver, x, y)
    mixture.set_weights(weighed.solution.weights)
    session.console.print(
        "Attacking the weights anew on the images that chose them, then on the test set", highlight=False
    )
    size, equal = session.data.eval_batch_size, uniform(len(members)).tolist()
    parts = zip(x.split(size), y.split(size), strict=True)
    attacked = partial(evaluate, mixture, attacks=attacks, threat_model=session.threat_model, other_weights=[equal])
    fresh = attacked(parts, seed=derive_seed(cfg.seed, "fresh"))
    choice = choose(fresh, session.data.num_classes, f"{len(y):,} validation images")
    test = attacked(session.test_batches(), seed=cfg.seed, vote=choice.vote)

    found = test.results(settings_of(cfg))
    doubts = flags_of_other_splits(
        cfg, sources, "fitted-on-training-images", "; it may know validation images.", remedy=""
    )
    lam = mixture.weights.cpu()
    results = replace(
        found,
        **header_of(session),
        members=named_results(found.members, members),
        counterparts=counterparts_of(test, choice),
        game=GameValue(**equilibrium_of(pool_of(test), lam)),
        classes=test.by_class(session.data.class_names),
        flags=(*flags_of_record(test), *doubts),
        solve=_solved(weighed, lam, cfg.lambda_solver["_target_"], [m.name for m in members], fresh, test),
        data=Data(
            session.data.name,
            num_val=session.data.num_val,
            num_test=session.data.num_test,
            left_out=session.data.left_out,
        ),
        seconds={"solve": round(weighed.seconds, 3), "total": round(time.perf_counter() - started, 3)},
    )
    exported = [k for k in range(len(members)) if lam[k] > 0 or not biases]
    config = _mixture_config(session, [members[k] for k in exported])
    card = solved_card(results, config, exported)
    save_mixture(mixture.support() if biases else mixture, run_dir / "mixture", config, card)
    arrays = test.arrays() | {records.INDICES: session.data.test_indices[: len(test.labels)].numpy()}
    arrays |= {records.UNIFORM_ROBUST: test.worst_case(np.asarray(equal))}
    keep_regions(run_dir, mixture, list(session.test_batches()), test, session.data.class_names)
    write_results(run_dir, results, arrays)
    run = as_finished(run_dir)
    draw_solution(run)
    draw_regions(run)
    with logging_to(loggers, cfg):
        log_results(loggers, results, sorted(run_dir.glob("*.png")))
    mark_done(run_dir)
    return run


def _validation_images(session: Session) -> tuple[Tensor, Tensor]:
    parts = list(session.validation_batches())
    if sum(len(y) for _, y in parts) < 2:
        raise UserError(
            "weights are fitted on the validation split, which has fewer than 2 images: set data.num_val=1000"
        )
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _play(
    session: Session, mixture: Mixture, attacks: Mapping[str, Attack], solver: LambdaSolver, x: Tensor, y: Tensor
) -> Weighed:
    """Solve the game on the images x, y."""
    started = time.perf_counter()
    columns = (TextColumn("Weighing {task.fields[members]} members on {task.fields[images]} validation images"),)
    progress = Progress(
        *columns, BarColumn(), TextColumn("{task.completed} attacked"), TimeElapsedColumn(), console=session.console
    )
    with progress:
        task = progress.add_task("", members=mixture.num_members, images=len(y), total=None)
        game = MixtureGame(
            mixture,
            x,
            y,
            session.threat_model,
            list(attacks.values()),
            ZeroOne(),
            generator_for(session.cfg.seed, "solve", device=session.device),
            batch_size=session.data.eval_batch_size,
            on_attack=lambda images: progress.advance(task, images),
        )
        solution = solver.solve(game, generator=game.generator)
    return Weighed(solution, game.known(), time.perf_counter() - started)


def _solved(
    weighed: Weighed, lam: Tensor, solver: str, names: list[str], fresh: EvaluationRecord, test: EvaluationRecord
) -> Solve:
    """What results.json holds of the solution: how it was found, its certificate, the table, the rounds."""
    solution, game = weighed.solution, weighed.game
    fit = Fit(
        num_examples=game.num_examples,
        solver=solver,
        status=solution.status,
        num_attacks=solution.num_attacks,
        num_points=game.num_perturbations,
        seconds=round(weighed.seconds, 3),
    )
    history = History(*(tuple(solution.history.get(one.name, ())) for one in fields(History)))
    return Solve(fit, _certificate(game, fresh, lam), _rows(names, lam, game, fresh, test), history)


def _certificate(pool: FiniteGame, fresh: EvaluationRecord, lam: Tensor) -> Certificate:
    """What is known of the weights on the images that chose them, over every point that anyone found there."""
    game = FiniteGame(torch.cat([pool.losses, pool_of(fresh).losses.to(pool.losses)], dim=1))
    return Certificate(
        **equilibrium_of(game, lam),
        best_member=float(game.deterministic_values().min()),
        value_at_uniform=game.value(uniform(len(lam))),
    )


def _rows(
    names: list[str], lam: Tensor, pool: FiniteGame, fresh: EvaluationRecord, test: EvaluationRecord
) -> tuple[SolveRow, ...]:
    """Members, uniform mixture and optimal mixture: accuracies on the pool, under fresh attacks, on the test set."""

    def row(who: str, weights: Tensor) -> SolveRow:
        array = weights.numpy()
        return SolveRow(
            who,
            tuple(weights.tolist()),
            clean=accuracy_of(test.expected(test.clean, array)),
            pool=Accuracy.of(1.0 - pool.value(weights), pool.num_examples),
            fresh=accuracy_of(fresh.worst_case(array)),
            test=accuracy_of(test.worst_case(array)),
        )

    vertices = torch.eye(len(names), dtype=torch.float64)
    rows = [row(name, vertex) for name, vertex in zip(names, vertices, strict=True)]
    # Its weights are those of the run.
    optimal = replace(row("optimal mixture", lam), weights=None)
    return (*rows, row("uniform mixture", uniform(len(names))), optimal)


def _mixture_config(session: Session, members: list[LoadedMember]) -> dict[str, Any]:
    return {
        "L": len(members),
        "models": [member.recipe.record() for member in members],
        "num_classes": session.data.num_classes,
        "image_shape": list(session.data.image_shape),
        **session.mixture_record(),
        "members": [member.source for member in members],
        "member_names": [member.name for member in members],
    }
