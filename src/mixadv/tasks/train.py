"""``task=train``: a mixture and, with ``baseline=true``, a single model beside it, measured once on the test set."""

import copy
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, ListConfig
from pytorch_lightning.loggers import Logger
from pytorch_lightning.plugins.environments import ClusterEnvironment
from pytorch_lightning.utilities.exceptions import MisconfigurationException

from mixadv.callbacks import Checkpoints, WholeFiles
from mixadv.checkpoint_files import LAST, newest, read_checkpoint
from mixadv.console import quiet_lightning
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationState
from mixadv.lambda_solvers import Uniform
from mixadv.members.recipe import Recipe, factories_of
from mixadv.members.source import LoadedMember, Source
from mixadv.members.store import load_mixture, save_mixture
from mixadv.mixture import Mixture
from mixadv.report import Run, draw_curves, draw_regions
from mixadv.report.files import BASELINE
from mixadv.results import Data, Flag, GrowthStage
from mixadv.runs import processes
from mixadv.runs.directory import State, mark_done, read_results, recorded, write_config, write_results
from mixadv.seeding import seed_all
from mixadv.setting_keys import TRAINING, is_indifferent
from mixadv.signals import Signals
from mixadv.tasks import build, models, speed
from mixadv.tasks.card import model_card
from mixadv.tasks.estimate import announce
from mixadv.tasks.logging_to import (
    build_loggers,
    log_accuracies,
    log_examples,
    logging_to,
    of_baseline,
    with_history,
)
from mixadv.tasks.measure import STATE, measure
from mixadv.tasks.members import apart, flags_of_other_splits, load_members, named_results, weights_of
from mixadv.tasks.session import Session, as_finished
from mixadv.training import Growth, MixtureTraining, Schedule
from mixadv.training.generators import same_draws
from mixadv.training.shared_attack import parts_of

# Warnings of Lightning that a user of the command line cannot act on.
IRRELEVANT = (
    # Lightning 2.6 under newer torch.
    "`isinstance.treespec, LeafSpec.` is deprecated",
    # Rows of the history also come from validations and weights phases.
    "The number of training batches .* is smaller than the logging interval",
    # Attacks put members in eval mode, every update puts its member back.
    "Found .* module.* in eval mode at the start of training",
    "The '.*_dataloader' does not have many workers",
)


# Keys of the group schedule that say how a mixture grows.
GROWTH = tuple(field.name for field in fields(Growth))


@dataclass(frozen=True)
class TrainingSession(Session):
    """What the steps of a training share, see `Session`.

    Attributes:
        recipes: one for each member.
        members: those of ``members=[...]``, with which the training starts; none: fresh ones.
        doubts: flags about them.
        parts: the arguments of `MixtureTraining` that groups of the configuration name.
        precision: of Lightning's Trainer.
        compiled: whether the members are compiled.
    """

    recipes: Sequence[Recipe]
    members: Sequence[LoadedMember]
    doubts: Sequence[Flag]
    parts: dict[str, Any]
    precision: str
    compiled: bool = False

    @property
    def images_per_process(self) -> int:
        """The images of a batch that each process trains on."""
        return min(self.data.batch_size, self.data.num_train) // processes.number(self.cfg)


def train(
    cfg: DictConfig, run_dir: Path, state: State, sweep: str | None, sources: Sequence[Source] = ()
) -> Run | None:
    """Algorithm 2 as configured, in `run_dir`, from the last checkpoint if it holds one.

    With ``trainer.fast_dev_run`` a few batches run and nothing is kept.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory; `state` is what it holds (not a finished run).
        sweep: name of the sweep this run belongs to.
        sources: the entries of ``members=[...]``, theta_0 of Algorithm 2; none: fresh members of ``model``.

    Returns:
        The finished run; None in processes other than rank 0, and with ``trainer.fast_dev_run``.

    Raises:
        UserError: data, memory or settings do not allow it, or the loss was not finite.
    """
    # Settings are refused before data are loaded, before the directory is written, and before loggers begin.
    parts, callbacks = _parts(cfg), build.build_callbacks(cfg, run_dir)
    loggers = with_history(build_loggers(cfg, run_dir, sweep), run_dir)
    session = _begin(cfg, run_dir, parts, sources)
    with _torch_errors(cfg):
        module = _module(session)
        _try_smallest_part(session, module)
        trainer = _trainer(session, loggers, callbacks)
    if cfg.trainer.fast_dev_run:
        with _torch_errors(cfg):
            _try_out(session, module, trainer)
        return None
    batches = speed.batches_of_training(cfg, module, session.data)
    if missing := phase_that_never_comes(module.schedule, batches):
        session.console.print(missing, highlight=False, soft_wrap=True)
    session = replace(session, compiled=speed.settle_compilation(cfg, batches, session.device, session.choices))
    if session.is_first:
        # In this order: other processes read the choices as soon as there is a configuration.
        session.choices.keep()
        write_config(run_dir, cfg)
    verb = "Continuing" if state is State.UNFINISHED else "Writing to"
    session.console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    with Signals(), logging_to(loggers, cfg), _torch_errors(cfg):
        _train_and_measure(session, module, trainer)
        if cfg.baseline:
            _train_baseline(session, loggers)
    return _finish(run_dir) if session.is_first else None


def _finish(run_dir: Path) -> Run:
    """Draw the curves and the regions, and write DONE."""
    run = as_finished(run_dir)
    if run.has_history:
        draw_curves(run)
    draw_regions(run)
    mark_done(run_dir)
    return run


def _begin(cfg: DictConfig, run_dir: Path, parts: dict[str, Any], sources: Sequence[Source]) -> TrainingSession:
    """Load the data and the members of `sources`, and settle what depends on them.

    Raises:
        UserError: data, model or members cannot be used, or the processes cannot share a batch evenly.
    """
    session = Session.begin(cfg, run_dir)
    data = session.data
    members: list[LoadedMember] = []
    if sources:
        members = apart(load_members(session, sources, data.train_images[:8].to(session.device).float() / 255))
        recipes = [member.recipe for member in members]
    else:
        recipes = [models.model_recipe(cfg.model, data)] * cfg.L
        models.check_own_model(recipes[0], data)
    count, size = processes.number(cfg), min(data.batch_size, data.num_train)
    if size % count:
        raise UserError(
            f"batches of {size} images cannot be divided among {count} processes: use data.batch_size="
            f"{max(1, size // count) * count}"
        )
    precision = speed.settle_precision(cfg, session.device, session.choices)
    doubts = flags_of_other_splits(
        cfg, sources, "another-split", "; it may know validation images, by which the epoch is chosen.", remedy=""
    )
    return TrainingSession(
        **vars(session), recipes=recipes, members=members, doubts=doubts, parts=parts, precision=precision
    )


def phase_that_never_comes(schedule: Schedule, batches: int) -> str:
    """One line that says so if a training of this many batches ends before its first weights phase, else ""."""
    first = schedule.first_phase
    if not schedule.weights_phases or schedule.grows or batches >= first:
        return ""
    most = (batches - 1) // (schedule.num_members if schedule.kind == "sampled" else 1)
    remedy = f"set schedule.T_theta={most} or less (now {schedule.T_theta})" if most else "raise trainer.max_epochs"
    return (
        f"lambda stays as it starts: the first weights phase is batch {first}, and this training has {batches} "
        f"batches; {remedy}, or set lambda_solver=uniform"
    )


@contextmanager
def _torch_errors(cfg: DictConfig) -> Iterator[None]:
    """Turn torch's errors on too large and too small batches into a `UserError`."""
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Expected more than 1 value per channel when training"):
            raise
        raise UserError(
            "batch norm cannot train on a single image: set data.batch_size and micro_batch_size to 2 images or more "
            "for each process, or choose a model without batch norm"
        ) from error
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


def _try_smallest_part(session: TrainingSession, module: MixtureTraining) -> None:
    """Run a member in train mode on one image, if batches or their parts are that small: batch norm may refuse it."""
    parts = parts_of(session.images_per_process, module.micro_batch_size)
    if min(part.stop - part.start for part in parts) > 1:
        return
    member = copy.deepcopy(module.mixture.members[0]).train()
    with same_draws(session.device), torch.no_grad():
        member(torch.full((1, *session.data.image_shape), 0.5))


def _try_out(session: TrainingSession, module: MixtureTraining, trainer: pl.Trainer) -> None:
    """Run a few batches of training, validation and test for ``trainer.fast_dev_run``; nothing is written."""
    with _lightning():
        trainer.fit(module, datamodule=session.data)
        trainer.test(module, datamodule=session.data, verbose=False)
    session.console.print("trainer.fast_dev_run: training, validation and test went through; nothing is kept")


def _train_baseline(session: TrainingSession, loggers: Sequence[Logger]) -> None:
    """Train one model for the same epochs per model, in ``baseline/``, which has the files of a run of its own."""
    run_dir = session.run_dir / BASELINE
    cfg = session.cfg.copy()
    cfg.L, cfg.baseline, cfg.weights = 1, False, None
    if isinstance(cfg.loss.get("class_weights"), ListConfig):
        cfg.loss.class_weights = cfg.loss.class_weights[:1]
    if session.is_first:
        run_dir.mkdir(exist_ok=True)
        write_config(run_dir, cfg)
    parts = session.parts | {"solver": Uniform(), "class_weights": build.build_class_weights(cfg)}
    single = replace(session, cfg=cfg, run_dir=run_dir, recipes=session.recipes[:1], parts=parts)
    own = of_baseline(loggers, cfg, run_dir)
    trainer = _trainer(single, own, build.build_callbacks(cfg, run_dir))
    _train_and_measure(single, _module(single), trainer)
    if session.is_first:
        _finish(run_dir)


def _train_and_measure(session: TrainingSession, module: MixtureTraining, trainer: pl.Trainer) -> None:
    """Train the members, measure the best epoch on the test set once, and write everything but DONE."""
    run_dir, data, loggers = session.run_dir, session.data, trainer.loggers
    measured_before = read_results(run_dir)
    if measured_before is not None:
        log_accuracies(loggers, measured_before, module.t)
        log_examples(loggers, session, load_mixture(run_dir / "mixture", factories_of(session.recipes)))
        return
    started = time.perf_counter()
    best_epoch, validation = _fit(session, module, trainer)
    training_seconds = time.perf_counter() - started

    mixture = module.grown.to(session.device)
    session.console.print(f"Measuring on {session.num_test_images} test images", highlight=False)
    measured = measure(session, mixture)
    if measured is None:
        return
    results, arrays = measured
    spent = {"train": round(training_seconds, 3), **results.seconds, "total": round(time.perf_counter() - started, 3)}
    results = replace(
        results,
        members=named_results(results.members, session.members[: mixture.num_members]),
        flags=(*(results.flags or ()), *session.doubts),
        data=Data(data.name, data.num_train, data.num_val, data.num_test, data.left_out),
        best_epoch=best_epoch,
        validation=validation,
        member_updates=tuple(module.member_updates),
        stages=tuple(GrowthStage(**asdict(stage)) for stage in module.stages),
        seconds=spent,
    )
    assert module.recipe is not None
    recipe = _of_first(module.recipe, mixture.num_members)
    save_mixture(mixture, run_dir / "mixture", recipe, model_card(results, recipe))
    log_accuracies(loggers, results, module.t)
    log_examples(loggers, session, mixture)
    write_results(run_dir, results, arrays)
    EvaluationState(run_dir / STATE).clear()


def _of_first(recipe: dict[str, Any], count: int) -> dict[str, Any]:
    """The recipe of the first `count` members: a growing mixture may end with fewer than L."""
    lists: dict[str, Any] = {key: recipe[key][:count] for key in ("models", "started_from") if key in recipe}
    return {**recipe, "L": count, **lists}


def _parts(cfg: DictConfig) -> dict[str, Any]:
    """The arguments of `MixtureTraining` that groups of the configuration name.

    Raises:
        UserError: one of them cannot be built.
    """
    return {
        "loss": build.build_loss(cfg),
        "class_weights": build.build_class_weights(cfg),
        "attack": build.build_training_attack(cfg),
        "members_phase": build.build_members_phase(cfg),
        "validation_attack": build.build_attack(cfg.protocol.validation, "protocol.validation"),
        "protocol": build.build_protocol(cfg),
        "solver": build.build_solver(cfg) if cfg.L > 1 else Uniform(),
        "phase": build.build_phase(cfg),
        "optimizer": build.instantiate(cfg.optimizer, "optimizer"),
        "scheduler": build.instantiate(cfg.scheduler, "scheduler"),
    }


def _training_record(cfg: DictConfig) -> dict[str, Any]:
    """The settings of the training that results depend on, as the exported mixture records them."""
    plain = recorded(cfg)
    kept = {key: plain[key] for key in TRAINING if not is_indifferent(key) and key not in ("callbacks", "baseline")}
    return kept | {"trainer": {key: plain["trainer"][key] for key in ("max_epochs", "precision", "gradient_clip_val")}}


def _module(session: TrainingSession) -> MixtureTraining:
    """The LightningModule for L members."""
    cfg = session.cfg
    recipes = session.recipes
    same = all(recipe == recipes[0] for recipe in recipes)
    recipe = {
        "L": len(recipes),
        **({"model": recipes[0].record()} if same else {"models": [one.record() for one in recipes]}),
        "loss": build.as_dict(cfg.loss),
        "training": _training_record(cfg),
        **session.mixture_record(),
    }
    # Models of mixadv have both among their arguments; other members need not.
    if session.members or any(one.is_factory for one in recipes):
        recipe |= {"num_classes": session.data.num_classes, "image_shape": list(session.data.image_shape)}
    if session.members:
        recipe["started_from"] = [member.source for member in session.members]
        mixture = Mixture([member.module for member in session.members]).train()
        weights = weights_of(cfg, session.members)
    else:
        mixture = models.build_members(recipes[0], cfg.L, cfg.seed, session.device)
        weights = cfg.weights and list(cfg.weights)
    if weights is not None:
        mixture.set_weights(weights)
    try:
        session.parts["class_weights"].table(mixture.num_members, session.data.num_classes)
    except ValueError as error:
        raise UserError(f"loss.{error}") from error
    try:
        module = MixtureTraining(
            mixture,
            session.threat_model,
            **session.parts,
            kind=cfg.schedule.kind,
            T_theta=cfg.schedule.T_theta,
            growth=Growth(**{name: cfg.schedule[name] for name in GROWTH}),
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


def _trainer(session: TrainingSession, loggers: Sequence[Logger], callbacks: Sequence[pl.Callback]) -> pl.Trainer:
    """Lightning's Trainer with the settings of ``trainer``.

    Raises:
        UserError: Lightning refuses it.
    """
    cfg = session.cfg
    settings = build.as_dict(cfg.trainer)
    # The module clips, per member.
    for key in ("gradient_clip_val", "gradient_clip_algorithm"):
        del settings[key]
    plugins = [build.instantiate(node, "trainer.plugins") for node in settings.pop("plugins") or []]
    if isinstance(settings["profiler"], dict):
        settings["profiler"] = build.instantiate(settings["profiler"], "trainer.profiler")
    settings |= build.trainer_settings(cfg, session.device)
    ours = [WholeFiles(), *settings.pop("plugins", [])]
    if any(isinstance(plugin, ClusterEnvironment) for plugin in plugins):
        ours = ours[:1]
    settings |= {
        "precision": session.precision,
        "logger": list(loggers),
        "callbacks": list(callbacks),
        "default_root_dir": session.run_dir,
        "use_distributed_sampler": False,
        "plugins": [*ours, *plugins],
    }
    try:
        with _lightning():
            return pl.Trainer(**settings)
    except (ValueError, TypeError) as error:
        raise UserError(f"trainer: {error}") from error


@contextmanager
def _lightning() -> Iterator[None]:
    """Turn Lightning's refusals into one line; hide its messages that a user cannot act on."""
    with quiet_lightning(), warnings.catch_warnings():
        for message in IRRELEVANT:
            warnings.filterwarnings("ignore", message=message)
        try:
            yield
        except (MisconfigurationException, ModuleNotFoundError) as error:
            raise UserError(f"trainer: {str(error).strip().splitlines()[0]}") from error


def _fit(session: TrainingSession, module: MixtureTraining, trainer: pl.Trainer) -> tuple[float, dict[str, float]]:
    """Train to the end, from the last checkpoint if there is one; then `module.mixture` gets the best epoch's members.

    Returns:
        The epochs per model of the best members, and the score that chose them by its name.
    """
    folder = session.run_dir / "checkpoints"
    files = trainer.strategy.checkpoint_io
    # A plugin of the user may take the place of ours.
    read = files.read if isinstance(files, WholeFiles) else read_checkpoint
    last = newest(folder, session.console.print, first=session.is_first, read=read)
    if last is None and session.is_first:
        announce(session, module)
    if session.compiled:
        _compile(session, module)
    seed_all(session.cfg.seed, "training")
    signals = Signals.active
    assert signals is not None
    try:
        with _lightning(), signals.shielded():
            trainer.fit(module, datamodule=session.data, ckpt_path=last, weights_only=True)
            module.ranks.stop_together(session.device)
    except SystemExit:
        # Lightning turns a signal into SystemExit.
        signals.check()
        raise
    (checkpoints,) = (callback for callback in trainer.checkpoint_callbacks if isinstance(callback, Checkpoints))
    # Without a validation there is no best checkpoint.
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


def _compile(session: TrainingSession, module: MixtureTraining) -> None:
    size = min(session.images_per_process, module.micro_batch_size or session.images_per_process)
    shape, bf16 = session.data.image_shape, session.precision == "bf16-mixed"
    graphs = speed.Graphs(size, shape, session.device, trained=True, bf16=bf16)
    speed.compile_members(session.cfg, module.mixture, graphs, session.console)
