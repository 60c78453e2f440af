"""``task=evaluate points=PATH``: saved points are judged on a mixture, and nothing is attacked."""

from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from mixadv import points_file
from mixadv.errors import UserError
from mixadv.mixture import Mixture
from mixadv.tasks.session import Session
from mixadv.threat_model import ThreatModel


class Replay:
    """The attack that returns its starts, which are the saved points."""

    transfers: ClassVar[bool] = False
    warm_starts: ClassVar[bool] = True

    def __call__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """The starts [B, ...] unchanged."""
        assert starts is not None, "an evaluation gives starts to attacks with warm_starts"
        return starts


def saved_points(session: Session) -> tuple[Tensor, Tensor]:
    """The places [N] in the run's test images that have a saved point, in their order there; and the points [N, ...].

    Raises:
        UserError: the file cannot be read, was made for other images or another ball, or a point lies outside its ball.
    """
    path, data, ball = session.cfg.points, session.data, session.threat_model
    try:
        saved = points_file.read(Path(path))
    except ValueError as error:
        raise UserError(f"points: {error}") from error
    # A larger ball holds worse points, and no attack has searched for them: the accuracy would be too high.
    own = saved.ball
    if own != ball:
        raise UserError(
            f"points={path} was saved for the {own.norm} ball of radius {own.eps}, and its points are no worst cases "
            f"of the {ball.norm} ball of radius {ball.eps}: give eps={own.eps} threat_model={own.norm}, or attack anew "
            "without points"
        )
    place = {int(index): i for i, index in enumerate(data.test_indices[: session.num_test_images])}
    missing = [index for index in saved.indices.tolist() if index not in place]
    if missing:
        raise UserError(
            f"points={path} has a point for image {missing[0]} of the test images, which this run does not measure: "
            "choose data=... and data.num_test=... as in the run that saved the points"
        )
    rows = torch.tensor([place[index] for index in saved.indices.tolist()], dtype=torch.long)
    order = rows.argsort()
    rows, points = rows[order], saved.points[order]
    images = data.test_images[rows].float() / 255
    if points.shape != images.shape or not torch.equal(data.test_labels[rows], saved.labels[order]):
        raise UserError(f"points={path} was saved for other images than those of {data.name}: choose their data=...")
    outside = (~ball.contains(points, images)).nonzero().flatten().tolist()
    if outside:
        first = int(data.test_indices[rows[outside[0]]])
        raise UserError(
            f"points={path}: {len(outside)} points, the first of image {first}, lie outside the {ball.norm} ball of "
            f"radius {ball.eps} or the box: the file is damaged, save the points again with protocol.save_points=true"
        )
    return rows, points
