"""Scikit-learn's embedded digits: a data set that needs no download and trains in seconds."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.split import stratified_subset
from mixadv.seeding import derive_seed

NUM_TEST_IMAGES = 360
# A constant, so that no seed of a run moves test images into training.
_TEST_SPLIT_SEED = "digits test"


class Digits(ImageDataModule):
    """1,797 grey 8x8 images of handwritten digits (Alpaydin & Kaynak 1998, the UCI test set as scikit-learn ships it).

    The published intensities are integers v in 0..16; here they are uint8, v 255 / 16 rounded half to even, so 0 and 16
    become 0 and 255 exactly and eps = 1/16 is about one grey level of the original. The published data have no test
    set: 360 images, stratified and the same in every run, are used as one, and 1,437 for training and validation.

    With `average` = m every image is the rounded mean of m different originals of its class and split, the same in
    every run; there are `copies` times as many of them as originals. No original is in the averages of two splits.
    Averages of a class are close to each other, so that few classes of them conflict in triangles (docs/ceiling.md).
    They share originals, so they are not independent of each other.

    Args:
        classes: the digits that are kept, in this order, as [1, 5, 7]; None for all.
        average: m, 1 for the originals.
        copies: averages for each original; `num_train`, `num_val` and `num_test` count originals. The average c of
            original i has the index i copies + c.
        draw: 0, 1, 2, ...: each has other test images, validation images and averages.
        val_fraction: 0.15 by default, 216 images.
        padding, flip: off by default: at 8x8 a shift by one pixel is large, and a mirrored digit is another shape.
        common: see `ImageDataModule`.
    """

    name = "Digits (8x8)"

    def __init__(
        self,
        *,
        classes: Sequence[int] | None = None,
        average: int = 1,
        copies: int = 1,
        draw: int = 0,
        val_fraction: float | None = 0.15,
        padding: int = 0,
        flip: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(val_fraction=val_fraction, padding=padding, flip=flip, **common)
        self.classes = list(range(10)) if classes is None else list(classes)
        if len(self.classes) < 2 or len(set(self.classes)) < len(self.classes) or set(self.classes) - set(range(10)):
            raise ValueError(f"classes={self.classes} must be two different digits or more, as [1,5,7]")
        if average < 1:
            raise ValueError(f"average={average} must be at least 1, the originals themselves")
        if copies < 1 or (copies > 1 and average == 1):
            raise ValueError(f"copies={copies} must be 1, or more with data.average of 2 or more: copies are averages")
        self.average, self.copies = average, copies
        if classes is not None:
            self.name += f", classes {', '.join(map(str, self.classes))}"
        if average > 1:
            self.name += f", averages of {average}" + (f", {copies} for each original" if copies > 1 else "")
        self.take_draw(draw)

    def load(self) -> ImageCorpus:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(pixels).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        test = stratified_subset(labels, NUM_TEST_IMAGES, self.of_draw(_TEST_SPLIT_SEED))
        is_test = torch.isin(torch.arange(len(labels)), test)
        place = torch.full((10,), -1)
        place[self.classes] = torch.arange(len(self.classes))
        labels = place[labels]
        train, test = ~is_test & (labels >= 0), is_test & (labels >= 0)
        names = tuple(str(bunch.target_names[digit]) for digit in self.classes)
        return ImageCorpus(images[train], labels[train], images[test], labels[test], names)

    def derived(self, images: Tensor, labels: Tensor, indices: Tensor, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """The averages, or the originals themselves; raises as `setup` does if a class has too few."""
        if self.average == 1:
            return images, labels, indices
        averages = torch.empty(len(images), self.copies, *images.shape[1:], dtype=torch.uint8)
        for label in labels.unique():
            own = (labels == label).nonzero().flatten()
            if len(own) < self.average:
                raise ValueError(
                    f"average={self.average}, but the {split} images hold {len(own)} of digit "
                    f"{self.classes[int(label)]}: lower average, or give the split more images"
                )
            for i in own.tolist():
                for copy in range(self.copies):
                    chosen = self._originals(split, i, own.tolist(), copy)
                    averages[i, copy] = images[chosen].double().mean(0).round().to(torch.uint8)
        places = indices[:, None] * self.copies + torch.arange(self.copies)
        return averages.flatten(0, 1), labels.repeat_interleave(self.copies), places.flatten()

    def _originals(self, split: str, i: int, own: list[int], copy: int) -> list[int]:
        """The originals of a class, numbered in their split, in one average."""
        # Not by a generator: its draws may differ between versions.
        which: list[int | str] = [self.of_draw("averages"), split, i, *([copy] if copy else [])]
        return sorted(own, key=lambda j: derive_seed(*which, j))[: self.average]
