"""``task=train``: a mixture and, with ``baseline=true``, a single model beside it, measured once on the test set."""

import itertools
import logging
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig
from rich.console import Console

from mixadv.config import parse_eps
from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationState
from mixadv.export import factories_of, load_mixture, save_mixture
from mixadv.lambda_solvers import Uniform
from mixadv.monitor.checkpoints import BEST, Checkpoints, WholeFiles, newest, read_checkpoint
from mixadv.monitor.console import ConsoleProgress
from mixadv.monitor.estimate import in_words, seconds_per_batch
from mixadv.monitor.history import History, Mirror
from mixadv.report import draw_curves
from mixadv.signals import Signals
from mixadv.tasks import batch_sizes, build, processes, speed
from mixadv.tasks.batch_sizes import Sizes
from mixadv.tasks.card import model_card
from mixadv.tasks.choices import Choices
from mixadv.tasks.measure import STATE, measure
from mixadv.tasks.mirror import mirror_results, mirrored
from mixadv.tasks.run_directory import State, mark_done, read_results, write_config, write_results
from mixadv.threat_model import ThreatModel
from mixadv.training import MixtureTraining, Schedule

PRESETS = "experiment=quickstart (digits, minutes) or experiment=cifar10_small_at (a small net on part of CIFAR-10)"
LONG_ON_CPU = 86400


@dataclass(frozen=True)
class Setting:
    """What the mixture and its baseline share."""

    cfg: DictConfig
    data: ImageDataModule
    device: torch.device
    threat_model: ThreatModel
    recipe: dict[str, Any]
    console: Console
    signals: Signals
    precision: str
    compiled: bool = False


def train(cfg: DictConfig, run_dir: Path, state: State, sweep: str | None) -> None:
    """Algorithm 2 as configured, in `run_dir`, from the last checkpoint if it holds one.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).
        sweep: name of the sweep this run belongs to.

    Raises:
        UserError: data, memory or settings do not allow it, or the loss was not finite.
    """
    first = processes.rank(cfg) == 0
    console = Console(quiet=not first)
    if cfg.logger.kind not in ("wandb", "csv"):
        raise UserError(f"logger.kind={cfg.logger.kind} is unknown: choose logger=wandb or logger=csv")
    device = build.resolve_device(cfg.trainer.accelerator, processes.place(cfg))
    data = batch_sizes.build_data(cfg)
    threat_model = build.build_threat_model(cfg.threat_model.norm, cfg.eps, data.image_shape)
    signals = Signals()
    choices = Choices(run_dir, processes.rank(cfg))
    precision, recipe = speed.settle_precision(cfg, device, choices), build.model_recipe(cfg.model, data)
    build.check_own_model(recipe, data)
    setting = Setting(cfg, data, device, threat_model, recipe, console, signals, precision)
    with _memory_errors(cfg):
        _sizes(setting).settle_batches(choices, console)
        _check_division(cfg, data)
        # Everything that can be refused is built once before the directory is written and the mirror started.
        module = _module(setting, choices)
    protocol = build.build_protocol(cfg)
    compiled = speed.settle_compilation(
        cfg, lambda: speed.operations_of_training(cfg, module, protocol, data), device, choices
    )
    setting = replace(setting, compiled=compiled)

    if first:
        # In this order: other processes read the choices as soon as there is a configuration.
        choices.keep()
        write_config(run_dir, cfg)
    verb = "Continuing" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    with signals, mirrored(cfg, run_dir, sweep, console) as mirror, _memory_errors(cfg):
        _train_and_measure(setting, module, run_dir, mirror)
        if cfg.baseline:
            _train_baseline(setting, run_dir / "baseline", mirror)
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
        raise UserError(
            f"out of memory with L={cfg.L} and data.batch_size={cfg.data.batch_size}: set trainer.micro_batch_size "
            f"(now {cfg.trainer.micro_batch_size}) to fewer images, as trainer.micro_batch_size=32, or lower one of "
            "them; the last checkpoint is kept"
        ) from error


def _train_baseline(setting: Setting, run_dir: Path, mirror: Any) -> None:
    """One model for the same epochs per model, with the files of a run of its own."""
    cfg = setting.cfg.copy()
    cfg.L, cfg.baseline = 1, False
    first = processes.rank(cfg) == 0
    if first:
        run_dir.mkdir(exist_ok=True)
        write_config(run_dir, cfg)
    single = replace(setting, cfg=cfg)
    module = _module(single, Choices(run_dir, processes.rank(cfg)))
    _train_and_measure(single, module, run_dir, None if mirror is None else mirror.baseline())
    if first:
        draw_curves(run_dir)
        mark_done(run_dir)


def _train_and_measure(setting: Setting, module: MixtureTraining, run_dir: Path, mirror: Any) -> None:
    """Train the module's members, evaluate the best epoch on the test set once, write everything but DONE."""
    cfg, data = setting.cfg, setting.data
    measured_before = read_results(run_dir)
    if measured_before is not None:
        if mirror is not None:
            mixture = load_mixture(run_dir / "mixture", factories_of({"model": setting.recipe}))
            mirror_results(mirror, cfg, measured_before, mixture, data, setting.threat_model, setting.device)
        return
    mixture_config = {
        "L": cfg.L,
        "model": setting.recipe,
        "threat_model": {"norm": cfg.threat_model.norm, "eps": parse_eps(cfg.eps)},
        "eps": str(cfg.eps),
        "loss": build.as_dict(cfg.loss),
        # Where the settings say auto, what it came to.
        "data": build.as_dict(cfg.data) | {key: getattr(data, key) for key in batch_sizes.KEYS},
        "data_name": data.name,
        "class_names": list(data.class_names),
        "seed": cfg.seed,
    }
    started = time.perf_counter()
    best_epoch = _fit(setting, module, run_dir, mixture_config, [] if mirror is None else [mirror])
    mixture = module.mixture.to(setting.device)
    training_seconds = time.perf_counter() - started

    limit = build.limited(cfg.trainer.limit_test_batches, len(data.test_dataloader()))
    console = setting.console
    console.print(f"Measuring on {min(data.num_test, limit * data.eval_batch_size)} test images", highlight=False)
    batches = itertools.islice(data.test_dataloader(), limit)
    names = data.class_names
    measured = measure(cfg, mixture, batches, setting.threat_model, setting.device, run_dir, names)
    if measured is None:
        return
    results, arrays = measured
    results["data"] = {
        "name": data.name,
        "num_train": data.num_train,
        "num_val": data.num_val,
        "num_test": data.num_test,
    }
    results["best_epoch"] = best_epoch
    results["member_updates"] = module.member_updates
    results["seconds"] = {
        "train": round(training_seconds, 3),
        **results["seconds"],
        "total": round(time.perf_counter() - started, 3),
    }
    save_mixture(mixture, run_dir / "mixture", mixture_config, model_card(results, mixture_config))
    if mirror is not None:
        mirror_results(mirror, cfg, results, mixture, data, setting.threat_model, setting.device)
    write_results(run_dir, results, arrays)
    EvaluationState(run_dir / STATE).clear()


def _sizes(setting: Setting) -> Sizes:
    cfg, loss = setting.cfg, build.instantiate(setting.cfg.loss, "loss")
    return Sizes(cfg, setting.data, setting.recipe, loss, setting.device, bf16=setting.precision == "bf16")


def _module(setting: Setting, choices: Choices) -> MixtureTraining:
    """The LightningModule for L members; the data's epochs are cut to its schedule."""
    cfg, data = setting.cfg, setting.data
    num_members = cfg.L
    solver = build.instantiate(cfg.lambda_solver, "lambda_solver") if num_members > 1 else Uniform()
    adapts = solver.adapts and num_members > 1
    schedule = Schedule(cfg.schedule.kind, num_members, cfg.schedule.T_theta, weights_phases=adapts)
    per_pass = max(1, data.num_train // data.batch_size)

    def batches_in_epoch(epoch: int) -> int:
        return build.limited(cfg.trainer.limit_train_batches, schedule.batches_in_epoch(epoch, per_pass))

    epochs = cfg.schedule.epochs
    total = sum(batches_in_epoch(epoch) for epoch in range(epochs))
    updates = schedule.member_batches_in(total)
    if cfg.schedule.kind == "sampled":
        updates = max(1, round(updates / num_members))
    data.batches_in_epoch = batches_in_epoch
    data.setup("fit")
    loss = build.instantiate(cfg.loss, "loss")
    return MixtureTraining(
        build.build_members(setting.recipe, num_members, cfg.seed, setting.device),
        loss=loss,
        threat_model=setting.threat_model,
        attack=build.build_attack(cfg.attack, "attack"),
        validation_attack=build.build_attack(cfg.protocol.validation, "protocol.validation"),
        solver=solver,
        kind=cfg.schedule.kind,
        T_theta=cfg.schedule.T_theta,
        optimizer=build.build_optimizer(cfg),
        updates_per_member=updates,
        total_batches=total,
        seed=cfg.seed,
        check_every=1 if setting.device.type == "cpu" else 50,
        interruptible=setting.signals.interruptible,
        micro_batch_size=_sizes(setting).micro_batch_size(choices, setting.console),
    )


def _fit(
    setting: Setting,
    module: MixtureTraining,
    run_dir: Path,
    mixture_config: dict[str, Any],
    mirrors: list[Mirror],
) -> float:
    """Train to the end, from the last checkpoint if there is one; afterwards `module.mixture` is the best epoch's."""
    cfg, data, console, device = setting.cfg, setting.data, setting.console, setting.device
    num_members, epochs = module.mixture.num_members, cfg.schedule.epochs
    last = newest(run_dir / "checkpoints", console.print, first=processes.rank(cfg) == 0)
    if last is None and processes.rank(cfg) == 0:
        _announce(setting, module)
    if setting.compiled:
        _compile(setting, module)
    pl.seed_everything(cfg.seed, verbose=False)
    title = f"mixture of {num_members}" if num_members > 1 else "single model"
    checkpoints = Checkpoints(
        run_dir / "checkpoints",
        mixture_config,
        minutes=cfg.trainer.checkpoint_minutes,
        member_updates=cfg.trainer.checkpoint_updates,
        signals=setting.signals,
    )
    watchers: list[pl.Callback] = []
    if processes.rank(cfg) == 0:
        watchers = [
            History(run_dir / "metrics.csv", num_members, cfg.trainer.log_every_steps, mirrors),
            ConsoleProgress(console, title, cfg.trainer.log_every_steps, cfg.trainer.progress),
        ]
    trainer = pl.Trainer(
        max_epochs=epochs,
        **processes.trainer_settings(cfg, device),
        precision="bf16-mixed" if setting.precision == "bf16" else "32-true",
        deterministic=cfg.trainer.deterministic,
        check_val_every_n_epoch=cfg.trainer.val_every_epochs,
        limit_val_batches=build.limited(cfg.trainer.limit_val_batches, len(data.val_dataloader())),
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        inference_mode=False,
        use_distributed_sampler=False,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=run_dir,
        plugins=[WholeFiles()],
        callbacks=[*watchers, checkpoints],
    )
    with warnings.catch_warnings():
        # Lightning 2.6 under newer torch: nothing that a user could act on.
        warnings.filterwarnings("ignore", message="`isinstance.treespec, LeafSpec.` is deprecated")
        try:
            with setting.signals.shielded():
                trainer.fit(module, datamodule=data, ckpt_path=last, weights_only=True)
                module.ranks.stop_together(device)
        except SystemExit:
            # Lightning turns signals into an exit without a word.
            setting.signals.check()
            raise
    best = read_checkpoint(run_dir / "checkpoints" / BEST)
    try:
        module.load_state_dict(best["state_dict"])
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{BEST} is of other members than these: start anew with resume=never") from error
    assert checkpoints.best is not None
    return checkpoints.best["epoch"]


def _compile(setting: Setting, module: MixtureTraining) -> None:
    cfg, data = setting.cfg, setting.data
    share = min(data.batch_size, data.num_train) // processes.number(cfg)
    size = min(share, module.micro_batch_size or share)
    graphs = speed.Graphs(size, data.image_shape, setting.device, trained=True, bf16=setting.precision == "bf16")
    speed.compile_members(cfg, module.mixture, graphs, setting.console)


def _announce(setting: Setting, module: MixtureTraining) -> None:
    """Say how long it will take, and what would fit where it is too long for this machine."""
    cfg, data, device = setting.cfg, setting.data, setting.device
    epochs = cfg.schedule.epochs
    # No more at once than the training itself takes.
    part = min(data.batch_size, module.micro_batch_size or data.batch_size)
    per_part = seconds_per_batch(module, data.image_shape, data.num_classes, part, device)
    per_batch = per_part * data.batch_size / part
    member_batches = module.schedule.member_batches_in(module.total_batches)
    phases = module.total_batches - member_batches
    steps = module.validation_attack.num_steps / max(1, module.training_attack.num_steps)
    validations = epochs / cfg.trainer.val_every_epochs * steps * data.num_val / data.batch_size
    seconds = per_batch * (member_batches + phases * module.solver.attack_cost() + validations)
    members = f"{module.mixture.num_members} members" if module.mixture.num_members > 1 else "one model"
    threads = torch.get_num_threads()
    cores = f"{threads} CPU core{'s' if threads > 1 else ''}"
    hardware = cores if device.type == "cpu" else torch.cuda.get_device_name(device)
    line = f"Training {members} for {epochs} epochs each on {hardware}: about {in_words(seconds)}"
    if device.type == "cpu" and seconds > LONG_ON_CPU:
        line += f".\n[bold yellow]That is for a GPU.[/] What fits this machine: {PRESETS}"
    setting.console.print(line, highlight=False, soft_wrap=True)
