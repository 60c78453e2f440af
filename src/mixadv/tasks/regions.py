"""What the members answer everywhere in the plane, for data of two numbers."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mixadv import records
from mixadv.correctness import answered
from mixadv.evaluation import EvaluationRecord
from mixadv.files import write_arrays
from mixadv.mixture import Mixture

# The unit square has so many cells on each side.
GRID = 240


def keep_regions(
    run_dir: Path,
    mixture: Mixture,
    batches: Sequence[tuple[Tensor, Tensor]],
    record: EvaluationRecord,
    names: Sequence[str],
) -> None:
    """Write regions.npz for images of two numbers (x, y); for other images do nothing.

    Args:
        run_dir: where it is written.
        mixture: whose members are asked.
        batches: the measured images, on the device of the mixture.
        record: of these images, with their worst points.
        names: of the classes.
    """
    x = torch.cat([images for images, _ in batches])
    if x[0].numel() != 2:
        return
    assert record.worst_points is not None
    # The image that is closest to the mean of its class: its ball stands for those of the others.
    points = x.flatten(1).double().cpu().numpy()
    shown = []
    for label in np.unique(record.labels):
        own = np.flatnonzero(record.labels == label)
        shown.append(own[np.linalg.norm(points[own] - points[own].mean(0), axis=1).argmin()])
    arrays = {
        records.ANSWERS: answers_in_the_plane(mixture, x),
        records.POINTS: points.astype(np.float32),
        records.LABELS: record.labels,
        records.SHOWN: np.array(shown),
        records.WORST: record.worst_points.flatten(1).numpy()[shown],
        records.CLASS_NAMES: np.array(names),
    }
    write_arrays(run_dir / records.REGIONS, arrays)


def answers_in_the_plane(mixture: Mixture, like: Tensor) -> np.ndarray:
    """The answers [L, GRID, GRID] int16 of the members at the centres of the cells of the unit square; -1: none.

    Cell [k, j, i] is around x = (i + 1/2) / GRID, y = (j + 1/2) / GRID.

    Args:
        like: images [N, ...] of two numbers, whose shape, device and type the points get.
    """
    side = (torch.arange(GRID) + 0.5) / GRID
    y, x = torch.meshgrid(side, side, indexing="ij")
    grid = torch.stack([x, y], dim=-1).reshape(-1, *like.shape[1:]).to(like)
    found = []
    with torch.no_grad(), mixture.attack_mode(plain=True):
        for part in grid.split(4096):
            logits = mixture.member_logits(part)
            found.append(torch.where(answered(logits), logits.argmax(-1), -1))
    return torch.cat(found, dim=1).view(-1, GRID, GRID).to("cpu", torch.int16).numpy()
