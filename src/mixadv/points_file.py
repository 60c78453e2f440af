"""points.safetensors: the worst point that a measurement found for each image. The one writer and the one reader."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mixadv.tensor_files import read_tensors, write_tensors
from mixadv.threat_model import ThreatModel

FILE = "points.safetensors"
SCHEMA = "mixadv.points.1"
_KINDS = {"points": torch.float32, "indices": torch.long, "labels": torch.long, "expected_accuracy": torch.float64}


@dataclass(frozen=True)
class Points:
    """One attacked image for each of N images.

    Attributes:
        points: [N, C, H, W] float32, in [0, 1].
        indices: [N] long, the places of the images in the test images as their data set publishes them.
        labels: [N] long.
        expected_accuracy: [N] float64, the exact expected accuracy of the measured mixture at its point.
        ball: in it around each image the point was searched; the point is a worst case of no other ball.
    """

    points: Tensor
    indices: Tensor
    labels: Tensor
    expected_accuracy: Tensor
    ball: ThreatModel


def write(path: Path, content: Points) -> None:
    """Write the file atomically; raises as `mixadv.files.replacing` does."""
    tensors = {name: getattr(content, name).to(kind) for name, kind in _KINDS.items()}
    write_tensors(path, tensors, {"schema": SCHEMA, "norm": content.ball.norm, "eps": repr(content.ball.eps)})


def read(path: Path) -> Points:
    """The content of a file that `write` wrote.

    Raises:
        ValueError: there is no such file, it is damaged, it holds something else, or it does not say for which ball its
            points were searched.
    """
    tensors, metadata = read_tensors(path)
    if metadata.get("schema") != SCHEMA or {name: tensor.dtype for name, tensor in tensors.items()} != _KINDS:
        raise ValueError(f"{path} holds no points of mixadv: give a {FILE} that protocol.save_points=true has written")
    if not {"norm", "eps"} <= metadata.keys():
        raise ValueError(
            f"{path} does not record the norm and eps of its points, because an earlier version wrote it: save them "
            "again with protocol.save_points=true"
        )
    try:
        ball = ThreatModel(metadata["norm"], float(metadata["eps"]))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    content = Points(**tensors, ball=ball)
    count = len(content.points)
    if content.points.ndim != 4 or any(tensors[name].shape != (count,) for name in _KINDS if name != "points"):
        raise ValueError(f"{path} is damaged: its tensors do not have the shapes of one point for each image")
    return content
