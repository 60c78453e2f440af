"""``task=train``: a mixture and, with ``baseline=true``, a single model beside it, measured once on the test set."""

import itertools
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from mixadv.callbacks import Checkpoints, WholeFiles
from mixadv.checkpoint_files import LAST, newest, read_checkpoint
from mixadv.config import parse_eps
from mixadv.console import Console, quiet_lightning
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationState
from mixadv.lambda_solvers import Uniform
from mixadv.members.recipe import Recipe
from mixadv.members.store import load_mixture, save_mixture
from mixadv.report import draw_curves
from mixadv.results import Data
from mixadv.runs import processes
from mixadv.runs.choices import Choices
from mixadv.runs.directory import State, mark_done, read_results, write_config, write_results
from mixadv.seeding import derive_seed
from mixadv.signals import Signals
from mixadv.tasks import build, models, speed
from mixadv.tasks.card import model_card
from mixadv.tasks.estimate import in_words, seconds_per_batch
from mixadv.tasks.logging_to import (
    build_loggers,
    log_accuracies,
    log_examples,
    logging_to,
    of_baseline,
    with_history,
)
from mixadv.tasks.measure import STATE, measure
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining
from mixadv.training.schedule import limited

PRESETS = "experiment=quickstart (digits, minutes) or experiment=cifar10_small_at (a small net on part of CIFAR-10)"
LONG_ON_CPU = 86400
# What Lightning says on the way and a user of the command line cannot act on.
IRRELEVANT = (
    # Lightning 2.6 under newer torch.
    "`isinstance.treespec, LeafSpec.` is deprecated",
    # Rows of the history also come from validations and weights phases.
    "The number of training batches .* is smaller than the logging interval",
    # Attacks put members in eval mode, every update puts its member back.
    "Found .* module.* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
)


@dataclass(frozen=True)
class Session:
    """What the mixture and its baseline share."""

    cfg: DictConfig
    data: ImageDataModule
    device: torch.device
    threat_model: ThreatModel
    recipe: Recipe
    console: Console
    precision: str
    # What the module is made of beside its members.
    parts: dict[str, Any]
    compiled: bool = False


def train(cfg: DictConfig, run_dir: Path, state: State, sweep: str | None) -> None:
    """Algorithm 2 as configured, in `run_dir`, from the last checkpoint if it holds one.

    With ``trainer.fast_dev_run`` a few batches run and nothing is kept.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).
        sweep: name of the sweep this run belongs to.

    Raises:
        UserError: data, memory or settings do not allow it, or the loss was not finite.
    """
    first = processes.rank(cfg) == 0
    console = Console(quiet=not first)
    device = build.resolve_device(cfg, processes.place(cfg))
    # Everything that can be refused is built before data are loaded, the directory is written and loggers begin.
    parts, callbacks = _parts(cfg), build.build_callbacks(cfg, run_dir)
    loggers = with_history(build_loggers(cfg, run_dir, sweep), run_dir)
    data = build.build_data(cfg.data)
    threat_model = build.build_threat_model(cfg.threat_model.norm, cfg.eps, data.image_shape)
    choices = Choices(run_dir, processes.rank(cfg))
    precision, recipe = speed.settle_precision(cfg, device, choices), models.model_recipe(cfg.model, data)
    models.check_own_model(recipe, data)
    session = Session(cfg, data, device, threat_model, recipe, console, precision, parts)
    _check_division(cfg, data)
    with _memory_errors(cfg):
        module = _module(session)
        trainer = _trainer(session, run_dir, loggers, callbacks)
    if cfg.trainer.fast_dev_run:
        with _memory_errors(cfg):
            _try_out(session, module, trainer)
        return
    compiled = speed.settle_compilation(cfg, speed.batches_of_training(cfg, module, data), device, choices)
    session = replace(session, compiled=compiled)

    if first:
        # In this order: other processes read the choices as soon as there is a configuration.
        choices.keep()
        write_config(run_dir, cfg)
    verb = "Continuing" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    with Signals(), logging_to(loggers, cfg), _memory_errors(cfg):
        _train_and_measure(session, module, trainer, run_dir)
        if cfg.baseline:
            _train_baseline(session, run_dir / "baseline", loggers)
    if first:
        mark_done(run_dir)


def _check_division(cfg: DictConfig, data: ImageDataModule) -> None:
    count, size = processes.number(cfg), min(data.batch_size, data.num_train)
    if size % count:
        raise UserError(
            f"batches of {size} images cannot be divided among {count} processes: use data.batch_size="
            f"{max(1, size // count) * count}"
        )


@contextmanager
def _memory_errors(cfg: DictConfig) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # The CPU's allocator raises a plain RuntimeError.
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error)
        if not known:
            raise
        now = "all" if cfg.micro_batch_size is None else cfg.micro_batch_size
        raise UserError(
            f"out of memory with L={cfg.L} and data.batch_size={cfg.data.batch_size}: set micro_batch_size (now {now}) "
            "to fewer images, as micro_batch_size=32, or lower one of them; the last checkpoint is kept"
        ) from error


def _try_out(session: Session, module: MixtureTraining, trainer: pl.Trainer) -> None:
    """A few batches of training, validation and test, as ``trainer.fast_dev_run`` asks for; nothing is written."""
    with _lightning():
        trainer.fit(module, datamodule=session.data)
        trainer.test(module, datamodule=session.data, verbose=False)
    session.console.print("trainer.fast_dev_run: training, validation and test went through; nothing is kept")


def _train_baseline(session: Session, run_dir: Path, loggers: Sequence[Logger]) -> None:
    """One model for the same epochs per model, with the files of a run of its own."""
    cfg = session.cfg.copy()
    cfg.L, cfg.baseline = 1, False
    first = processes.rank(cfg) == 0
    if first:
        run_dir.mkdir(exist_ok=True)
        write_config(run_dir, cfg)
    single = replace(session, cfg=cfg, parts=session.parts | {"solver": Uniform()})
    own = of_baseline(loggers, cfg, run_dir)
    trainer = _trainer(single, run_dir, own, build.build_callbacks(cfg, run_dir))
    _train_and_measure(single, _module(single), trainer, run_dir)
    if first:
        draw_curves(run_dir)
        mark_done(run_dir)


def _train_and_measure(session: Session, module: MixtureTraining, trainer: pl.Trainer, run_dir: Path) -> None:
    """Train the module's members, evaluate the best epoch on the test set once, write everything but DONE."""
    cfg, data, device, loggers = session.cfg, session.data, session.device, trainer.loggers
    measured_before = read_results(run_dir)
    if measured_before is not None:
        log_accuracies(loggers, measured_before, module.t)
        mixture = load_mixture(run_dir / "mixture", [session.recipe.name])
        log_examples(loggers, cfg, mixture, data, session.threat_model, device)
        return
    started = time.perf_counter()
    best_epoch, validation = _fit(session, module, trainer, run_dir)
    mixture = module.mixture.to(device)
    training_seconds = time.perf_counter() - started

    limit = limited(cfg.trainer.limit_test_batches, len(data.test_dataloader()))
    images = min(data.num_test, limit * data.eval_batch_size)
    session.console.print(f"Measuring on {images} test images", highlight=False)
    batches = itertools.islice(data.test_dataloader(), limit)
    names = data.class_names
    measured = measure(cfg, mixture, batches, session.threat_model, device, run_dir, names)
    if measured is None:
        return
    results, arrays = measured
    spent = {"train": round(training_seconds, 3), **results.seconds, "total": round(time.perf_counter() - started, 3)}
    results = replace(
        results,
        data=Data(data.name, data.num_train, data.num_val, data.num_test),
        best_epoch=best_epoch,
        validation=validation,
        member_updates=tuple(module.member_updates),
        seconds=spent,
    )
    assert module.recipe is not None
    save_mixture(mixture, run_dir / "mixture", module.recipe, model_card(results, module.recipe))
    log_accuracies(loggers, results, module.t)
    log_examples(loggers, cfg, mixture, data, session.threat_model, device)
    write_results(run_dir, results, arrays)
    EvaluationState(run_dir / STATE).clear()


def _parts(cfg: DictConfig) -> dict[str, Any]:
    """What the groups name for the module.

    Raises:
        UserError: one of them cannot be built.
    """
    return {
        "loss": build.instantiate(cfg.loss, "loss"),
        "attack": build.build_attack(cfg.attack, "attack"),
        "validation_attack": build.build_attack(cfg.protocol.validation, "protocol.validation"),
        "protocol": build.build_protocol(cfg),
        "solver": build.instantiate(cfg.lambda_solver, "lambda_solver") if cfg.L > 1 else Uniform(),
        "optimizer": build.instantiate(cfg.optimizer, "optimizer"),
        "scheduler": build.instantiate(cfg.scheduler, "scheduler"),
    }


def _module(session: Session) -> MixtureTraining:
    """The LightningModule for L members."""
    cfg, data = session.cfg, session.data
    recipe = {
        "L": cfg.L,
        "model": session.recipe.record(),
        "threat_model": {"norm": cfg.threat_model.norm, "eps": parse_eps(cfg.eps)},
        "eps": str(cfg.eps),
        "loss": build.as_dict(cfg.loss),
        "data": build.as_dict(cfg.data),
        "data_name": data.name,
        "class_names": list(data.class_names),
        "seed": cfg.seed,
    }
    mixture = models.build_members(session.recipe, cfg.L, cfg.seed, session.device)
    try:
        module = MixtureTraining(
            mixture,
            session.threat_model,
            **session.parts,
            kind=cfg.schedule.kind,
            T_theta=cfg.schedule.T_theta,
            gradient_clip_val=cfg.trainer.gradient_clip_val,
            gradient_clip_algorithm=cfg.trainer.gradient_clip_algorithm,
            seed=cfg.seed,
            micro_batch_size=cfg.micro_batch_size,
            recipe=recipe,
        )
    except ValueError as error:
        raise UserError(str(error)) from error
    # The loggers have the whole configuration already.
    module.save_hyperparameters(dict(module.hparams), logger=False)
    return module


def _trainer(
    session: Session, run_dir: Path, loggers: Sequence[Logger], callbacks: Sequence[pl.Callback]
) -> pl.Trainer:
    """Lightning's Trainer with everything that ``trainer`` says.

    Raises:
        UserError: Lightning refuses it.
    """
    cfg = session.cfg
    settings = build.as_dict(cfg.trainer)
    # Clipping is per member, and the module's business.
    for key in ("gradient_clip_val", "gradient_clip_algorithm"):
        del settings[key]
    plugins = [build.instantiate(node, "trainer.plugins") for node in settings.pop("plugins") or []]
    if isinstance(settings["profiler"], dict):
        settings["profiler"] = build.instantiate(settings["profiler"], "trainer.profiler")
    settings |= build.trainer_settings(cfg, session.device)
    settings |= {
        "precision": session.precision,
        "logger": list(loggers),
        "callbacks": list(callbacks),
        "default_root_dir": run_dir,
        "use_distributed_sampler": False,
        "plugins": [WholeFiles(), *plugins],
    }
    try:
        with _lightning():
            return pl.Trainer(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error


@contextmanager
def _lightning() -> Iterator[None]:
    """Lightning's refusals in one line; without what it says that a user cannot act on."""
    with quiet_lightning(), warnings.catch_warnings():
        for message in IRRELEVANT:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def _fit(
    session: Session, module: MixtureTraining, trainer: pl.Trainer, run_dir: Path
) -> tuple[float, dict[str, float]]:
    """Train to the end, from the last checkpoint if there is one; afterwards `module.mixture` is the best epoch's.

    Returns:
        The epochs per model of the best members, and the score that chose them by its name.
    """
    cfg, console = session.cfg, session.console
    folder = run_dir / "checkpoints"
    last = newest(folder, console.print, first=processes.rank(cfg) == 0)
    if last is None and processes.rank(cfg) == 0:
        _announce(session, module)
    if session.compiled:
        _compile(session, module)
    pl.seed_everything(derive_seed(cfg.seed, "training") % 2**32, verbose=False)
    signals = Signals.active
    assert signals is not None
    try:
        with _lightning(), signals.shielded():
            trainer.fit(module, datamodule=session.data, ckpt_path=last, weights_only=True)
            module.ranks.stop_together(session.device)
    except SystemExit:
        # Lightning turns signals into an exit without a word.
        signals.check()
        raise
    (checkpoints,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    # Without a validation there is no best.
    best = Path(checkpoints.best_model_path or folder / LAST)
    if not best.exists() and not module.t:
        raise UserError("the training ended before its first batch: raise trainer.max_time or trainer.max_steps")
    checkpoint = read_checkpoint(best)
    try:
        module.load_state_dict(checkpoint["state_dict"])
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{best.name} is of other members than these: start anew with resume=never") from error
    score = checkpoints.best_model_score
    chosen = {} if score is None else {str(checkpoints.monitor): float(score)}
    return float(checkpoint["mixadv"]["epochs_done"]), chosen


def _compile(session: Session, module: MixtureTraining) -> None:
    cfg, data = session.cfg, session.data
    share = min(data.batch_size, data.num_train) // processes.number(cfg)
    size = min(share, module.micro_batch_size or share)
    graphs = speed.Graphs(size, data.image_shape, session.device, trained=True, bf16=session.precision == "bf16-mixed")
    speed.compile_members(cfg, module.mixture, graphs, session.console)


def _announce(session: Session, module: MixtureTraining) -> None:
    """Say how long it will take, and what would fit where it is too long for this machine."""
    cfg, data, device = session.cfg, session.data, session.device
    epochs = cfg.trainer.max_epochs
    # No more at once than the training itself takes.
    part = min(data.batch_size, module.micro_batch_size or data.batch_size)
    per_part = seconds_per_batch(module, data.image_shape, data.num_classes, part, device)
    per_batch = per_part * data.batch_size / part
    total = speed.batches_of_training(cfg, module, data)
    member_batches = module.schedule.member_batches_in(total)
    steps = module.validation_attack.num_steps / max(1, module.training_attack.num_steps)
    validations = epochs / (cfg.trainer.check_val_every_n_epoch or 1) * steps * data.num_val / data.batch_size
    phases = total - member_batches
    seconds = per_batch * (member_batches + phases * module.solver.attack_cost() + validations)
    members = f"{module.mixture.num_members} members" if module.mixture.num_members > 1 else "one model"
    threads = torch.get_num_threads()
    cores = f"{threads} CPU core{'s' if threads > 1 else ''}"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else cores
    times = f"{epochs} epoch{'s' if epochs > 1 else ''}"
    line = f"Training {members} for {times} each on {hardware}: about {in_words(seconds)}"
    if device.type == "cpu" and seconds > LONG_ON_CPU:
        line += f".\n[bold yellow]That is for a GPU.[/] What fits this machine: {PRESETS}"
    session.console.print(line, highlight=False, soft_wrap=True)
