"""Three classes in the plane, where a mixture must win: each two conflict, but no three points have a common answer."""

import math

import torch
from torch import Tensor

from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.seeding import derive_seed

SIDE, DEVIATION, RADIUS = 0.5, 0.004, 0.012
_HEIGHT = SIDE * math.sqrt(3) / 2
CORNERS = ((0.5 - SIDE / 2, 0.5 - _HEIGHT / 2), (0.5 + SIDE / 2, 0.5 - _HEIGHT / 2), (0.5, 0.5 + _HEIGHT / 2))


class Triangle(ImageDataModule):
    """Points of the unit square as images [1, 1, 2] of two grey levels, x and y; class k is Gaussian around corner k.

    The corners form an equilateral triangle of side d = 0.5; the deviation is 0.004 along each axis. A point is rounded
    to the grid of uint8 (multiples of 1/255), and drawn again while it is more than r = 0.012 from its corner. So any
    two points of different classes are at most d + 2r = 0.524 apart: at l2 eps = 0.262 (threat_model=l2) they conflict,
    and every deterministic classifier is right on the balls of one class at most, 1/3. Three points of three classes
    have no common point there, since eps < d / sqrt(3) - r = 0.276: the best mixture reaches 1/2 (docs/ceiling.md).

    The grid holds few points near a corner, so that most test points are equal to training points: what is measured
    is robustness, not generalisation.

    Args:
        num_train, num_val, num_test: numbers of points, as equal over the classes as possible.
        draw: 0, 1, 2, ...: other points.
        batch_size, eval_batch_size, seed: see `ImageDataModule`.
    """

    name = "Triangle (plane)"

    def __init__(
        self,
        *,
        num_train: int = 1200,
        num_val: int = 180,
        num_test: int = 180,
        draw: int = 0,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        seed: int = 0,
    ) -> None:
        super().__init__(
            num_train=num_train,
            num_val=num_val,
            num_test=num_test,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            seed=seed,
            padding=0,
            flip=False,
        )
        self.take_draw(draw)
        self._numbers = num_train + num_val, num_test

    def load(self) -> ImageCorpus:
        (train, train_labels), (test, test_labels) = (
            self._points(split, number) for split, number in zip(("train", "test"), self._numbers, strict=True)
        )
        return ImageCorpus(train, train_labels, test, test_labels, ("left", "right", "top"))

    def _points(self, split: str, number: int) -> tuple[Tensor, Tensor]:
        labels = torch.arange(number) % len(CORNERS)
        points = [self._point(CORNERS[i % len(CORNERS)], split, i) for i in range(number)]
        return torch.tensor(points, dtype=torch.uint8).view(-1, 1, 1, 2), labels

    def _point(self, corner: tuple[float, float], split: str, i: int) -> tuple[int, int]:
        """The grey levels of point i. Not by a generator: its draws may differ between versions."""
        again = 0
        while True:
            u, v = (derive_seed(self.of_draw("triangle"), split, i, again, axis) / 2**63 for axis in ("r", "angle"))
            # Box and Muller (1958): a Gaussian pair from two uniform numbers.
            length, angle = DEVIATION * math.sqrt(-2 * math.log(1 - u)), 2 * math.pi * v
            x = round(255 * (corner[0] + length * math.cos(angle)))
            y = round(255 * (corner[1] + length * math.sin(angle)))
            if math.dist((x / 255, y / 255), corner) <= RADIUS:
                return x, y
            again += 1
