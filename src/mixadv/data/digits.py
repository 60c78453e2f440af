"""Scikit-learn's embedded digits: a data set that needs no download and trains in seconds."""

from typing import Any

import numpy as np
import torch

from mixadv.data.base import ImageCorpus, ImageDataModule
from mixadv.data.split import stratified_subset

NUM_TEST_IMAGES = 360
# A constant, so that no seed of a run moves test images into training.
_TEST_SPLIT_SEED = "digits test"


class Digits(ImageDataModule):
    """1,797 grey 8x8 images of handwritten digits (Alpaydin & Kaynak 1998, the UCI test set as scikit-learn ships it).

    The published intensities are integers v in 0..16; here they are uint8, v 255 / 16 rounded half to even, so 0 and 16
    become 0 and 255 exactly and eps = 1/16 is about one grey level of the original. The published data have no test
    set: 360 images, stratified and the same in every run, are used as one, and 1,437 for training and validation.

    Args:
        val_fraction: 0.15 by default, 216 images.
        padding, flip: off by default: at 8x8 a shift by one pixel is large, and a mirrored digit is another shape.
        common: see `ImageDataModule`.
    """

    name = "Digits (8x8)"

    def __init__(
        self, *, val_fraction: float | None = 0.15, padding: int = 0, flip: bool = False, **common: Any
    ) -> None:
        super().__init__(val_fraction=val_fraction, padding=padding, flip=flip, **common)

    def load(self) -> ImageCorpus:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
        images = torch.from_numpy(pixels).unsqueeze(1)
        labels = torch.from_numpy(bunch.target).long()
        is_test = torch.isin(torch.arange(len(labels)), stratified_subset(labels, NUM_TEST_IMAGES, _TEST_SPLIT_SEED))
        names = tuple(str(name) for name in bunch.target_names)
        return ImageCorpus(images[~is_test], labels[~is_test], images[is_test], labels[is_test], names)
