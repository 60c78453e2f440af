"""``task=evaluate``: attack an exported mixture, a checkpoint, or members with weights on the test set."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.evaluation import EvaluationState
from mixadv.members.recipe import member_recipes
from mixadv.members.source import LoadedMember, Source
from mixadv.mixture import Mixture
from mixadv.report import Run, write_report
from mixadv.results import Classifier, Data, Flag
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.tasks import build, speed
from mixadv.tasks.logging_to import build_loggers, log_results, logging_to
from mixadv.tasks.measure import STATE, measure
from mixadv.tasks.members import flags_of_other_splits, load_members, named_results, recorded_members, weights_of
from mixadv.tasks.replay import saved_points
from mixadv.tasks.session import Session, as_finished

# The number of images on which members are tried before the attacks.
TRIED = 8


def evaluate_mixture(
    cfg: DictConfig, run_dir: Path, state: State, *, sweep: str | None, mixture: Mixture, config: dict[str, Any]
) -> Run | None:
    """Measure a mixture under ``cfg.protocol``, in a claimed directory.

    Args:
        cfg: the checked configuration.
        run_dir: claimed; `state` is what it holds.
        sweep: name of the sweep this run belongs to.
        mixture: to be measured. config: what it records of itself.

    Returns:
        The finished run; None in processes other than rank 0.

    Raises:
        UserError: data that do not fit it.
    """
    session = Session.begin(cfg, run_dir)
    _check_fit(config, session.data)
    training = config.get("training")
    called = recorded_members(config, mixture.num_members)
    return _evaluate(session, sweep, mixture, called, training=training if isinstance(training, dict) else {})


def evaluate_members(
    cfg: DictConfig, run_dir: Path, state: State, *, sweep: str | None, sources: Sequence[Source]
) -> Run | None:
    """Measure the mixture of the members of `sources` with ``cfg.weights`` (None: 1/L) as `evaluate_mixture` does.

    In results.json each member also has a name, source and note.

    Raises:
        UserError: members that cannot be loaded or do not fit one another or the data, or another number of weights
            than of members.
    """
    session = Session.begin(cfg, run_dir)
    data = session.data
    x = torch.cat([data.test_images[:TRIED], data.train_images[:TRIED]])[:TRIED].float() / 255
    members = load_members(session, sources, x)
    mixture = Mixture([member.module for member in members], weights_of(cfg, members))
    for k, (member, weight) in enumerate(zip(members, mixture.weights.tolist(), strict=True)):
        line = f"member {k}: {member.name}, weight {weight:.4f} (from {member.source}, {member.note})"
        session.console.print(line, highlight=False, markup=False, soft_wrap=True)
    # Every split has the same test images.
    evidence = (
        ": it did not learn from the training images that this run's settings describe. It knows no test images from "
        "that, but members that learned from different images are not compared on equal terms."
    )
    flags = flags_of_other_splits(cfg, sources, "another-split", evidence, ", or train the members on one split")
    return _evaluate(session, sweep, mixture, members, flags)


def _evaluate(
    session: Session,
    sweep: str | None,
    mixture: Mixture,
    members: Sequence[LoadedMember | Classifier] = (),
    flags: Sequence[Flag] = (),
    *,
    training: dict[str, Any] | None = None,
) -> Run | None:
    cfg, run_dir, data = session.cfg, session.run_dir, session.data
    # Refused before the directory is written: the corrected command can use it.
    build.build_protocol(cfg)
    if cfg.points:
        saved_points(session)
    loggers = build_loggers(cfg, run_dir, sweep)
    if session.is_first:
        write_config(run_dir, cfg)
    mixture.to(session.device)
    speed.compile_for_evaluation(session, mixture)
    started = time.perf_counter()
    with logging_to(loggers, cfg):
        measured = measure(session, mixture)
        if measured is None:
            return None
        results, arrays = measured
        results = replace(
            results,
            training=training or {},
            members=named_results(results.members, members),
            flags=(*(results.flags or ()), *flags),
            data=Data(data.name, num_test=data.num_test, left_out=data.left_out),
            seconds={**results.seconds, "total": round(time.perf_counter() - started, 3)},
        )
        write_results(run_dir, results, arrays)
        EvaluationState(run_dir / STATE).clear()
        run = as_finished(run_dir)
        write_report(run)
        mark_done(run_dir)
        log_results(loggers, results, sorted(run_dir.glob("*.png")))
    return run


def as_trained(cfg: DictConfig, config: dict[str, Any], overrides: list[str]) -> DictConfig:
    """`cfg` with data, eps and norm as the mixture records them, except the keys that the command line sets.

    Raises:
        UserError: the command line sets a key that only the mixture can decide.
    """
    given = build.keys_of(overrides)
    for key in given:
        if key in ("experiment", "L", "model") or key.startswith("model."):
            raise UserError(f"{key}=...: task=evaluate takes it from the mixture; leave it out")
    merged = build.as_recorded(cfg, config, given, cfg.mixture)
    merged.L = int(config["L"])
    merged.model = {"_target_": ", ".join(dict.fromkeys(recipe.target for recipe in member_recipes(config)))}
    return merged


def _check_fit(config: dict[str, Any], data: ImageDataModule) -> None:
    found = (data.num_classes, tuple(data.image_shape))
    # Recipes of factories may lack these keys; the config of the mixture has them.
    for record in (config, *(recipe.arguments for recipe in member_recipes(config))):
        if not {"num_classes", "image_shape"} <= set(record):
            continue
        shape = record["image_shape"]
        wanted = (record["num_classes"], tuple(shape) if isinstance(shape, (list, tuple)) else shape)
        if wanted != found:
            raise UserError(
                f"the mixture takes images {wanted[1]} in {wanted[0]} classes, but {data.name} has {found[1]} in "
                f"{found[0]}: choose the data it was trained for with data=..."
            )
