"""``task=ceiling``: what any classifier and any mixture can reach on given images, before anything is trained."""

import os
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from mixadv import records
from mixadv.config import ceiling_splits, parse_eps
from mixadv.console import Console
from mixadv.data.base import ImageDataModule
from mixadv.game import Conflicts, ceiling, conflicts, over_radii
from mixadv.report import Run
from mixadv.report.ceiling import write_ceiling
from mixadv.results import CeilingRow, Data, Results
from mixadv.runs.directory import State, mark_done, write_config, write_results
from mixadv.tasks.build import as_dict, build_data, build_threat_model
from mixadv.tasks.provenance import device_name, provenance
from mixadv.tasks.session import Session, as_finished

# The closest pairs of different classes that are drawn.
CLOSEST = 6
# For the line of other tasks: multiplications of the search (seconds), and limits above which it has no optima.
_PRODUCTS, _MOST_PAIRS, _SECONDS = 4e11, 40_000, 5.0


def find_ceiling(cfg: DictConfig, run_dir: Path, state: State) -> Run:
    """Find the conflicts among the images of ``ceiling.split`` and both optima at every radius of ``ceiling.eps``.

    Writes config.yaml, ceiling.npz, results.json, ceiling.csv, ceiling.png and DONE; from the start, where an earlier
    try was interrupted.

    Args:
        cfg: the checked configuration.
        run_dir: a claimed directory, `state` what it holds (not a finished run).

    Raises:
        UserError: data that are missing or damaged, or a radius larger than the box.
    """
    console = Console()
    started = time.perf_counter()
    data = build_data(cfg.data)
    norm = cfg.threat_model.norm
    listed = [cfg.eps] if cfg.ceiling.eps is None else list(cfg.ceiling.eps)
    radii = sorted({build_threat_model(norm, eps, data.image_shape).eps for eps in listed})
    images, labels = _images(data, ceiling_splits(cfg))
    write_config(run_dir, cfg)
    verb = "Starting again in" if state is State.UNFINISHED else "Writing to"
    console.print(f"{verb} {os.path.relpath(run_dir)}", highlight=False, soft_wrap=True)
    searched = time.perf_counter()
    found = conflicts(images, labels, radii[-1], norm, closest=CLOSEST)
    spent = {"load": searched - started, "conflicts": time.perf_counter() - searched}
    arrays = _pictures(found, images, data.class_names)
    arrays[records.LABELS] = labels.numpy()
    solved, seconds = [], []
    for eps in radii:
        at = time.perf_counter()
        solved.append(ceiling(found.at(eps), cfg.ceiling.time_limit))
        seconds.append(time.perf_counter() - at)
    rows = []
    for k, best in enumerate(over_radii(solved)):
        rows.append(_row(found.at(radii[k]), best, seconds[k]))
        arrays[f"q/{k}"], arrays[f"right/{k}"] = best.q, best.right.astype(np.uint8)
    facts = provenance()
    results = Results(
        task=cfg.task,
        seed=cfg.seed,
        device=device_name(torch.device("cpu")),
        versions={**facts["versions"], "scipy": version("scipy")},
        git=facts["git"],
        config=as_dict(cfg),
        norm=norm,
        eps=parse_eps(cfg.eps),
        num_examples=len(labels),
        first_conflict_eps=found.first_conflict_eps,
        ceiling=tuple(rows),
        flags=(),
        data=Data(data.name, data.num_train, data.num_val, data.num_test, data.left_out),
        seconds={name: round(value, 3) for name, value in {**spent, "total": time.perf_counter() - started}.items()},
    )
    write_results(run_dir, results, arrays, records.CEILING)
    run = as_finished(run_dir)
    write_ceiling(run)
    mark_done(run_dir)
    return run


def _images(data: ImageDataModule, splits: list[str]) -> tuple[Tensor, Tensor]:
    """The images uint8 [N, C, H, W] and labels [N] of some splits."""
    names = {"train": "train", "validation": "val", "test": "test"}
    images = torch.cat([getattr(data, f"{names[split]}_images") for split in splits])
    return images, torch.cat([getattr(data, f"{names[split]}_labels") for split in splits]).long()


def _row(found: Conflicts, solved: Any, seconds: float) -> CeilingRow:
    values = ("randomised", "randomised_upper", "deterministic", "deterministic_upper", "gain_at_most", "status")
    return CeilingRow(
        eps=found.eps,
        num_examples=len(found),
        in_conflict=float(found.in_conflict.mean()),
        pairs=len(found.pairs) if found.all_pairs else None,
        **{name: getattr(solved, name) for name in values},
        seconds=round(seconds, 3),
    )


def _pictures(found: Conflicts, images: Tensor, names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The closest pairs of different classes, and for each the image in the middle, which is in both balls first."""
    pairs = torch.from_numpy(found.closest)
    middles = [found.common_point(images, pair) for pair in found.closest.tolist()]
    return {
        "closest": found.closest,
        "closest_distances": found.closest_distances,
        "closest_images": images[pairs].numpy(),
        "closest_middles": np.array(middles, dtype=np.float32).reshape(len(pairs), *images.shape[1:]),
        "class_names": np.array(names),
    }


def measured_ceiling(session: Session) -> dict[str, Any]:
    """The fields of `Results` on the measured test images at the radius of the run, computed in seconds.

    Many images in many dimensions are cut to the first ones. With many pairs the optima are left out.
    """
    started = time.perf_counter()
    data, ball = session.data, session.threat_model
    dimension = data.test_images[0].numel()
    count = min(session.num_test_images, max(2, int((2 * _PRODUCTS / dimension) ** 0.5)))
    found = conflicts(data.test_images[:count], data.test_labels[:count], ball.eps, ball.norm)
    row = CeilingRow(
        eps=ball.eps,
        num_examples=count,
        in_conflict=float(found.in_conflict.mean()),
        pairs=len(found.pairs) if found.all_pairs else None,
        status="only the conflicts were counted",
    )
    if found.all_pairs and len(found.pairs) <= _MOST_PAIRS:
        row = _row(found, ceiling(found, _SECONDS), 0.0)
    row = replace(row, seconds=round(time.perf_counter() - started, 3))
    return {"first_conflict_eps": found.first_conflict_eps, "ceiling": (row,)}
