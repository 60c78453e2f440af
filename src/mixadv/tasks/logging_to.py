"""Builds the loggers of a run and sends them settings, accuracies, images and figures."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger

from mixadv.config import parse_eps
from mixadv.correctness import correct
from mixadv.errors import UserError
from mixadv.instantiate import arguments_of, named
from mixadv.loggers.accuracies import accuracies_of
from mixadv.loggers.csv import CSVLogger
from mixadv.loggers.hyperparameters import flat_config
from mixadv.loggers.wandb import WandbLogger
from mixadv.mixture import Mixture
from mixadv.results import Results
from mixadv.runs.directory import recorded
from mixadv.seeding import generator_for
from mixadv.signals import Stopped
from mixadv.tasks import build
from mixadv.tasks.session import Session


def build_loggers(cfg: DictConfig, run_dir: Path, sweep: str | None) -> list[Logger]:
    """Build the loggers of the configuration.

    Arguments ``save_dir``, ``name`` and ``group`` that a logger accepts and the command does not set come from the run.

    Raises:
        UserError: a logger cannot be built.
    """
    targets = [str(node.get("_target_")) for node in cfg.logger.values()]
    if sweep is not None and "WANDB_SWEEP_ID" in os.environ and any(name.endswith(".WandbLogger") for name in targets):
        raise UserError("an agent of a Weights & Biases sweep gives each command one run: leave -m out of its command")
    own = {"save_dir": str(run_dir), "name": run_dir.name, "group": sweep}
    built = []
    for name, node in cfg.logger.items():
        settings = build.as_dict(node)
        taken, _ = arguments_of(named(settings["_target_"], f"logger.{name}"))
        missing = {key: value for key, value in own.items() if key in taken and settings.get(key) is None}
        built.append(build.instantiate({**settings, **missing}, f"logger.{name}"))
    return built


def with_history(loggers: Sequence[Logger], run_dir: Path) -> list[Logger]:
    """`loggers` with a `CSVLogger` in front: `WandbLogger` sends the rows that it finds in metrics.csv."""
    return [CSVLogger(run_dir), *(logger for logger in loggers if not isinstance(logger, CSVLogger))]


@contextmanager
def logging_to(loggers: Sequence[Logger], cfg: DictConfig) -> Iterator[None]:
    """Log the settings as hyperparameters; at the end, close the loggers with the run's exit code."""
    code = 1
    try:
        choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
        for logger in loggers:
            logger.log_hyperparams(flat_config(recorded(cfg), dict(choices), parse_eps(cfg.eps)))
        yield
        code = 0
    except Stopped as stop:
        code = stop.exit_code
        raise
    finally:
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.finish(code)
            else:
                logger.finalize("success" if code == 0 else "failed")


def of_baseline(loggers: Sequence[Logger], cfg: DictConfig, run_dir: Path) -> list[Logger]:
    """The loggers of the baseline: the same run in Weights & Biases, separate files for other loggers."""
    mirrors = [logger.baseline() for logger in loggers if isinstance(logger, WandbLogger)]
    others = [logger for logger in build_loggers(cfg, run_dir, None) if not isinstance(logger, WandbLogger)]
    return with_history([*others, *mirrors], run_dir)


def log_accuracies(loggers: Sequence[Logger], results: Results, step: int) -> None:
    """Log the measured accuracies, except to metrics.csv, which holds the history of the training only."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.summary(results)
        elif not isinstance(logger, CSVLogger):
            logger.log_metrics(accuracies_of(results), step)


def log_examples(loggers: Sequence[Logger], session: Session, mixture: Mixture) -> None:
    """Log a table of the first test images under the attack of the validation; only `WandbLogger` takes one."""
    for logger in loggers:
        if isinstance(logger, WandbLogger) and logger.num_images > 0 and session.is_first:
            logger.images(*_example_images(session, mixture.to(session.device), logger.num_images))


def _example_images(
    session: Session, mixture: Mixture, count: int
) -> tuple[np.ndarray, np.ndarray, list[str], list[str], float]:
    """Clean and attacked test images [N, C, H, W], their labels, which members the attack fooled, and eps."""
    attack = build.build_attack(session.cfg.protocol.validation, "protocol.validation")
    x, y = (part[:count] for part in next(iter(session.test_batches())))
    draws = generator_for(session.cfg.seed, "examples", device=x.device)
    x_adv = attack(mixture, x, y, session.threat_model, draws)
    with torch.no_grad(), mixture.attack_mode(plain=True):
        wrong = ~correct(mixture.member_logits(x_adv), y)
    fooled = [", ".join(str(int(k)) for k in column.nonzero().flatten()) or "none" for column in wrong.T]
    labels = [session.data.class_names[int(label)] for label in y]
    return x.cpu().numpy(), x_adv.cpu().numpy(), labels, fooled, session.threat_model.eps


def log_results(loggers: Sequence[Logger], results: Results, figures: Sequence[Path]) -> None:
    """Log accuracies, tables and figures of a run without training."""
    log_accuracies(loggers, results, step=0)
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.log_results(results, [path for path in figures if path.exists()])
