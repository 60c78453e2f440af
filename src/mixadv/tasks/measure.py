"""The measured part of a run, the same for training and for evaluation."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from mixadv import records
from mixadv.attacks.search import Attack
from mixadv.attacks.suite import passes_of
from mixadv.console import Console
from mixadv.evaluation import (
    ABOVE,
    CHECKS_OF_RECORD,
    Choice,
    EvaluationRecord,
    EvaluationState,
    checks_made,
    choose,
    counterparts_of,
    curves,
    distrust,
    equilibrium_of,
    evaluate,
    fingerprint,
    flags_above,
    flags_of_record,
    pool_of,
)
from mixadv.files import write_arrays
from mixadv.mixture import Mixture
from mixadv.points_file import FILE as POINTS
from mixadv.points_file import Points
from mixadv.points_file import write as write_points
from mixadv.results import Curve, Curves, GameValue, Results
from mixadv.seeding import derive_seed
from mixadv.tasks.build import build_attack, build_protocol, trainer_settings
from mixadv.tasks.ceiling import measured_ceiling
from mixadv.tasks.provenance import header_of, settings_of
from mixadv.tasks.regions import keep_regions
from mixadv.tasks.replay import Replay, saved_points
from mixadv.tasks.session import Session

# The number of attacked images that a run keeps to be shown.
EXAMPLES = 8
STATE = "evaluation"


def measure(session: Session, mixture: Mixture) -> tuple[Results, dict[str, np.ndarray]] | None:
    """Attack the test images with the protocol, or judge the points of ``cfg.points`` on their images.

    Finished attacks are kept in ``run_dir/evaluation``, so that a killed measurement continues with the attack that it
    was in. A few attacked images are written to examples.npz; for images of two numbers, the answers of the members in
    the plane to regions.npz.

    Returns:
        The results without those of the training, and the arrays of records.npz; None in processes other than rank 0,
        which attack a part of the images.

    Raises:
        UserError: the directory holds the state of another measurement.
    """
    started = time.perf_counter()
    cfg, ball = session.cfg, session.threat_model
    batches = list(session.test_batches())
    attacks, settings = build_protocol(cfg), settings_of(cfg)
    starts, choice, vote = None, None, None
    indices = session.data.test_indices[: sum(len(y) for _, y in batches)]
    if cfg.points:
        rows, starts = saved_points(session)
        batches, indices = _rows(batches, rows), session.data.test_indices[rows]
        attacks, settings = {"replay": Replay()}, {"replay": {"points": cfg.points}}
    else:
        choice = _choice(session, mixture)
        vote = choice.vote if mixture.num_members > 1 else None
    given = batches if starts is None else [*batches, (starts, indices)]
    mark = fingerprint(mixture, given, [json.dumps(settings, sort_keys=True), ball, cfg.seed, vote])
    num_passes = len(passes_of(attacks, mixture)) + (vote is not None)
    total = num_passes * sum(len(y) for _, y in batches)
    with _bar(total, cfg.trainer.enable_progress_bar and session.is_first) as advance:
        record = evaluate(
            mixture,
            batches,
            attacks,
            ball,
            seed=cfg.seed,
            vote=vote,
            starts=starts,
            state=EvaluationState(session.run_dir / STATE, mark),
            on_progress=advance,
            processes=trainer_settings(cfg, session.device),
        )
    if not session.is_first:
        return None
    reachable = measured_ceiling(session)
    diagnosis = _diagnosis(session, mixture, batches, record, attacks)
    (row,) = reachable["ceiling"]
    # Saved points need not be of the first images.
    if not cfg.points and row.num_examples == len(record.labels) and row.randomised_upper is not None:
        diagnosis["flags"] += tuple(flags_above(record, row))
        diagnosis["checks"] += (ABOVE,)
    results = replace(
        record.results(settings),
        **header_of(session),
        **reachable,
        **diagnosis,
        counterparts=None if choice is None else counterparts_of(record, choice),
        content=mark,
        classes=record.by_class(session.data.class_names),
        game=GameValue(**equilibrium_of(pool_of(record), torch.from_numpy(record.weights))),
        seconds={"evaluate": round(time.perf_counter() - started, 3)},
    )
    _keep_examples(session.run_dir / records.EXAMPLES, batches, record, session.data.class_names)
    keep_regions(session.run_dir, mixture, batches, record, session.data.class_names)
    arrays = record.arrays() | {records.INDICES: indices.numpy()}
    if cfg.protocol.get("save_points", False):
        assert record.worst_points is not None
        labels, robust = torch.from_numpy(record.labels), torch.from_numpy(record.worst_case())
        saved = Points(record.worst_points, indices, labels, robust, ball)
        write_points(session.run_dir / POINTS, saved)
    return results, arrays


def _rows(batches: Sequence[tuple[Tensor, Tensor]], rows: Tensor) -> list[tuple[Tensor, Tensor]]:
    """The images `rows` [N] of all batches together, in batches of the same size."""
    size = len(batches[0][1])
    x, y = (torch.cat(parts)[rows.to(parts[0].device)] for parts in zip(*batches, strict=True))
    return list(zip(x.split(size), y.split(size), strict=True))


def _choice(session: Session, mixture: Mixture) -> Choice:
    """The counterparts of the mixture, chosen on the validation images under the attack of the validation.

    Without validation images (``trainer.limit_val_batches=0``) on the clean test images, and the vote has no threshold.
    """
    cfg = session.cfg
    batches, images = list(session.validation_batches()), "validation images"
    if not batches:
        batches, images = list(session.test_batches()), "clean test images"
    attacks = {"validation": build_attack(cfg.protocol.validation, "protocol.validation")}
    record = evaluate(
        mixture,
        batches,
        # A single model leaves no choice but that of the constant.
        {} if mixture.num_members == 1 or images != "validation images" else attacks,
        session.threat_model,
        seed=derive_seed(cfg.seed, "counterparts"),
        processes=trainer_settings(cfg, session.device),
    )
    return choose(record, session.data.num_classes, f"{len(record.labels):,} {images}")


def _diagnosis(
    session: Session,
    mixture: Mixture,
    batches: Sequence[tuple[Tensor, Tensor]],
    record: EvaluationRecord,
    attacks: Mapping[str, Attack],
) -> dict[str, Any]:
    """Flags, the checks behind them, and curves over eps and steps, on the first ``protocol.diagnosed`` images."""
    count, seed = session.cfg.protocol.get("diagnosed", 0), session.cfg.seed
    # Curves and flags come from attacks of their own.
    if not count or session.cfg.points:
        return {"flags": tuple(flags_of_record(record)), "checks": CHECKS_OF_RECORD}
    x, y = (torch.cat(parts)[:count] for parts in zip(*batches, strict=True))
    found = curves(mixture, x, y, session.threat_model, seed=seed)
    return {
        "flags": tuple(distrust(mixture, x, y, session.threat_model, record, attacks, seed=seed)),
        "checks": checks_made(mixture, record, attacks),
        "curves": Curves(found["num_examples"], Curve(**found["eps"]), Curve(**found["steps"])),
    }


def _bar(total: int, wanted: bool) -> AbstractContextManager[Any]:
    """A progress bar in a terminal; the context gives a function (pass, number of images) that advances it, or None."""
    console = Console()
    return _Bar(total, console) if wanted and console.is_terminal else nullcontext(None)


class _Bar(AbstractContextManager[Any]):
    def __init__(self, total: int, console: Console) -> None:
        columns = TextColumn("{task.description}"), BarColumn(bar_width=24), TimeElapsedColumn(), TimeRemainingColumn()
        self.progress = Progress(*columns, console=console, transient=True)
        self.task = self.progress.add_task("", total=total)

    def __enter__(self) -> Any:
        self.progress.start()
        return lambda key, count: self.progress.update(self.task, advance=count, description=key)

    def __exit__(self, *error: object) -> None:
        self.progress.stop()


def _keep_examples(
    path: Path, batches: Sequence[tuple[Tensor, Tensor]], record: EvaluationRecord, class_names: Sequence[str]
) -> None:
    """Write some images, their worst points, which members are right there, and which attack found the point.

    They are the first ones that an attack made worse; where these are few, the first others too.
    """
    assert record.worst_points is not None
    found_by = np.asarray(record.found_by())
    kept = np.argsort(found_by == records.CLEAN, kind="stable")[:EXAMPLES]
    everything = {records.CLEAN: record.clean, **record.found}
    arrays = {
        records.X: torch.cat([x for x, _ in batches])[kept].cpu().numpy(),
        records.X_ADV: record.worst_points[kept].numpy(),
        records.LABELS: np.asarray([class_names[int(label)] for label in record.labels[kept]]),
        records.CORRECT: np.stack([everything[found_by[i]][:, i] for i in kept], axis=1),
        records.FOUND_BY: found_by[kept],
    }
    write_arrays(path, arrays)
