"""``task=solve``: the optimal weights over classifiers that exist already."""

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from mixadv import records
from mixadv.attacks.search import Attack
from mixadv.config import parse_eps
from mixadv.console import Console
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationRecord, equilibrium_of, evaluate, pool_of
from mixadv.evaluation.record import accuracy_of
from mixadv.game import Equilibrium, FiniteGame
from mixadv.lambda_solvers import LambdaSolver
from mixadv.losses import ZeroOne
from mixadv.members.source import LoadedMember, Source
from mixadv.members.store import save_mixture
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.report import draw_solution
from mixadv.results import Accuracy, Certificate, Data, Fit, Game, History, Row, Solve
from mixadv.runs.choices import Choices
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.seeding import derive_seed, generator_for
from mixadv.simplex import uniform
from mixadv.tasks import build, speed
from mixadv.tasks.card import solved_card
from mixadv.tasks.logging_to import build_loggers, log_results, logging_to
from mixadv.tasks.measure import settings_of, with_header
from mixadv.tasks.members import flags_of_other_splits, named_members, named_results
from mixadv.threat_model import ThreatModel
from mixadv.training.schedule import limited


@dataclass(frozen=True)
class Weighing:
    """What the steps of the task share."""

    cfg: DictConfig
    mixture: Mixture
    threat_model: ThreatModel
    attacks: dict[str, Attack]
    device: torch.device
    console: Console


def solve_weights(
    cfg: DictConfig, run_dir: Path, state: State, *, sweep: str | None, sources: Sequence[Source]
) -> None:
    """Weigh the members of `sources` on validation images and measure the result on the test set, in a claimed folder.

    The weights are those of the game whose payoff is the 0/1 loss and whose best response is every attack of the
    protocol; `cfg.lambda_solver` plays it. The test set is used once, for the table.

    Raises:
        UserError: members that cannot be loaded, or do not fit one another or the data.
    """
    console = Console()
    started = time.perf_counter()
    device = build.resolve_device(cfg)
    solver = build.instantiate(cfg.lambda_solver, "lambda_solver")
    if not solver.adapts:
        raise UserError("lambda_solver=uniform solves nothing: use lp, oracle or entropic (1/L is in the table anyway)")
    attacks, loggers = build.build_protocol(cfg), build_loggers(cfg, run_dir, sweep)
    data = build.build_data(cfg.data)
    threat_model = build.build_threat_model(cfg.threat_model.norm, cfg.eps, data.image_shape)
    x, y = _validation_images(cfg, data, device)
    members = named_members(cfg, sources, data, x[:8], device)
    if len(members) < 2:
        raise UserError("members=[...] holds one classifier: there is nothing to weigh, name two or more")
    mixture = Mixture([member.module for member in members]).to(device)
    weighing = Weighing(cfg, mixture, threat_model, attacks, device, console)
    write_config(run_dir, cfg)
    choices = Choices(run_dir)
    speed.settle_evaluation(cfg, data, mixture, device, choices, console)

    solution, game, seconds = _play(weighing, solver, x, y, data.eval_batch_size)
    mixture.set_weights(solution.weights)
    other = [uniform(len(members)).tolist()]
    console.print("Attacking the weights anew on the images that chose them, then on the test set", highlight=False)
    parts = zip(x.split(data.eval_batch_size), y.split(data.eval_batch_size), strict=True)
    fresh = evaluate(mixture, parts, attacks, threat_model, seed=derive_seed(cfg.seed, "fresh"), other_weights=other)
    loader = data.test_dataloader()
    limit = limited(cfg.trainer.limit_test_batches, len(loader))
    batches = ((x.to(device), y.to(device)) for x, y in itertools.islice(loader, limit))
    test = evaluate(mixture, batches, attacks, threat_model, seed=cfg.seed, other_weights=other)
    # As the solver gave them: the mixture's own may be rounded.
    test.weights = solution.weights.numpy()

    fit = Fit(
        num_examples=len(y),
        solver=cfg.lambda_solver["_target_"],
        status=solution.status,
        num_attacks=solution.num_attacks,
        num_points=game.num_perturbations,
        seconds=round(seconds, 3),
    )
    found = with_header(test.results(settings_of(cfg)), cfg, threat_model, device)
    doubts = flags_of_other_splits(
        cfg, sources, "fitted-on-training-images", "; it may know validation images.", remedy=""
    )
    results = replace(
        found,
        members=named_results(found.members, members),
        game=Game(**equilibrium_of(pool_of(test), solution.weights)),
        flags=tuple(doubts),
        solve=Solve(
            fit=fit,
            certificate=_certificate(game, fresh, solution.weights),
            rows=_rows([m.name for m in members], solution.weights, game, fresh, test),
            history=History(*(tuple(solution.history.get(f.name, ())) for f in fields(History))),
        ),
        data=Data(data.name, num_val=data.num_val, num_test=data.num_test),
        seconds={"solve": round(seconds, 3), "total": round(time.perf_counter() - started, 3)},
    )
    mixture_config = _mixture_config(cfg, data, members)
    save_mixture(mixture, run_dir / "mixture", mixture_config, solved_card(results, mixture_config))
    arrays = test.arrays() | {records.UNIFORM_ROBUST: test.worst_case(np.asarray(other[0]))}
    write_results(run_dir, results, arrays)
    draw_solution(run_dir)
    with logging_to(loggers, cfg):
        log_results(loggers, results, sorted(run_dir.glob("*.png")))
    mark_done(run_dir)


def _validation_images(cfg: DictConfig, data: ImageDataModule, device: torch.device) -> tuple[Tensor, Tensor]:
    loader = data.val_dataloader()
    limit = limited(cfg.trainer.limit_val_batches, len(loader))
    parts = [(x.to(device), y.to(device)) for x, y in itertools.islice(loader, limit)]
    if sum(len(y) for _, y in parts) < 2:
        raise UserError(
            "weights are fitted on the validation split, which has fewer than 2 images: set data.num_val=1000"
        )
    return torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


def _play(
    weighing: Weighing, solver: LambdaSolver, x: Tensor, y: Tensor, batch_size: int
) -> tuple[Equilibrium, FiniteGame, float]:
    """The solver's answer, all points that it provoked, and seconds."""
    started = time.perf_counter()
    columns = (TextColumn("Weighing {task.fields[members]} members on {task.fields[images]} validation images"),)
    progress = Progress(
        *columns, BarColumn(), TextColumn("{task.completed} attacked"), TimeElapsedColumn(), console=weighing.console
    )
    with progress:
        task = progress.add_task("", members=weighing.mixture.num_members, images=len(y), total=None)
        game = MixtureGame(
            weighing.mixture,
            x,
            y,
            weighing.threat_model,
            list(weighing.attacks.values()),
            ZeroOne(),
            generator_for(weighing.cfg.seed, "solve", device=weighing.device),
            batch_size=batch_size,
            on_attack=lambda images: progress.advance(task, images),
        )
        solution = solver.solve(game, generator=game.generator)
    return solution, game.known(), time.perf_counter() - started


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
) -> tuple[Row, ...]:
    """Members, uniform mixture and optimal mixture: accuracies on the pool, under fresh attacks, on the test set."""

    def row(who: str, weights: Tensor) -> Row:
        array = weights.numpy()
        return Row(
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


def _mixture_config(cfg: DictConfig, data: ImageDataModule, members: list[LoadedMember]) -> dict[str, Any]:
    return {
        "L": len(members),
        "models": [member.recipe.record() for member in members],
        "num_classes": data.num_classes,
        "image_shape": list(data.image_shape),
        "threat_model": {"norm": cfg.threat_model.norm, "eps": parse_eps(cfg.eps)},
        "eps": str(cfg.eps),
        "data": build.as_dict(cfg.data),
        "data_name": data.name,
        "class_names": list(data.class_names),
        "seed": cfg.seed,
        "members": [member.source for member in members],
    }
