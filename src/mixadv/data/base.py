"""The base class of the data sets: splits, statistics, and batches on the device."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningDataModule
from torch import Tensor

from mixadv.data.split import channel_statistics, stratified_subset
from mixadv.data.stream import BatchStream
from mixadv.errors import UserError

# The splits do not depend on the seed of a run: models trained with different seeds share validation images that none
# of them has seen, and are compared on the same test images.
_VALIDATION_SEED = "validation"
_TRAINING_SUBSET_SEED = "training subset"
_TEST_SUBSET_SEED = "test subset"


def user_cache() -> Path:
    """The user's cache folder: `mixadv` in XDG_CACHE_HOME or ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mixadv"


@dataclass(frozen=True)
class ImageCorpus:
    """A data set as published: images uint8 [N, C, H, W], labels long [N] in 0..len(class_names) - 1."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_names: tuple[str, ...]

    def validate(self, name: str) -> None:
        """Check shapes, dtypes and labels of the data set `name`.

        Raises:
            UserError: one is not as documented; the message names the first such fault.
        """
        for split in ("train", "test"):
            images: Tensor = getattr(self, f"{split}_images")
            labels: Tensor = getattr(self, f"{split}_labels")
            if images.dtype != torch.uint8 or images.ndim != 4:
                raise UserError(
                    f"{name}: {split} images are {images.dtype} {tuple(images.shape)}, not uint8 [N,C,H,W]: convert "
                    "them to whole numbers 0..255"
                )
            if images.shape[1:] != self.train_images.shape[1:]:
                raise UserError(
                    f"{name}: test images are {tuple(images.shape[1:])}, training images "
                    f"{tuple(self.train_images.shape[1:])} (channels, height, width)"
                )
            if images.numel() == 0 or labels.shape != (len(images),):
                raise UserError(
                    f"{name}: {len(images)} {split} images with {len(labels)} labels, {images[:1].numel()} values each:"
                    " give every image a label and at least one pixel"
                )
            if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
                raise UserError(f"{name}: {split} labels are {labels.dtype}, not whole numbers")
            wrong = ((labels < 0) | (labels >= len(self.class_names))).nonzero()
            if len(wrong):
                index = int(wrong[0])
                raise UserError(
                    f"{name}: {split} image {index} has label {int(labels[index])}, but the "
                    f"{len(self.class_names)} classes are numbered 0..{len(self.class_names) - 1}"
                )
        counts = torch.bincount(self.train_labels.long(), minlength=len(self.class_names))
        if len(counts) < 2:
            raise UserError(f"{name}: {len(counts)} class: a classifier needs two classes or more")
        for label, count in enumerate(counts.tolist()):
            if not count:
                raise UserError(
                    f"{name}: no training image has label {label} ({self.class_names[label]!r}): the data are "
                    "incomplete; fetch them again, or remove the class"
                )


class ImageDataModule(LightningDataModule):
    """Images as uint8 tensors, split into training, validation and test, served as batches in [0, 1].

    The test images are those of the published test set. The validation images are a stratified part of the published
    training images. There are `num_val` of them; if that is not given, v = `val_fraction` is their share in all
    images used: round(v N) of the N published images, and the rest for training, or round(n v / (1 - v)) for
    n = `num_train` training images. `num_train` and `num_test` select stratified subsets of that size. No split
    depends on the seed; `draw` (0 unless a data set has the setting) names another split of the same images.

    After `setup`: `train_images`, `val_images`, `test_images` (uint8 [N, C, H, W]), `train_labels`, ... (long [N]),
    `train_indices`, `val_indices`, `test_indices` (their places in the published order), `class_names`, and `mean`,
    `std` (one float per channel, of the training images in [0, 1]). `left_out` counts what was not read, by reason.

    Args:
        batch_size: training images per batch. It changes the result (steps per epoch, noise of the gradient).
        eval_batch_size: validation and test images per batch.
        val_fraction: v in (0, 1); ignored if `num_val` is given.
        num_val: number of validation images, at least 1.
        seed: of the order of the batches and of the augmentation; the splits do not depend on it.
        num_train: number of training images, None for all.
        num_test: number of test images, None for all.
        padding, flip: augmentation of training batches, see `random_crop_flip`.

    Raises:
        ValueError: an argument is outside its range, at construction or (numbers of images, padding) in `setup`.
        UserError: the data are missing or damaged, in `prepare_data` or `setup`.
    """

    name: str = "images"
    train_images: Tensor
    train_labels: Tensor
    train_indices: Tensor
    val_images: Tensor
    val_labels: Tensor
    val_indices: Tensor
    test_images: Tensor
    test_labels: Tensor
    test_indices: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    left_out: dict[str, int]
    draw: int = 0

    def __init__(
        self,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 256,
        val_fraction: float | None = 0.1,
        num_val: int | None = None,
        seed: int = 0,
        num_train: int | None = None,
        num_test: int | None = None,
        padding: int = 4,
        flip: bool = True,
    ) -> None:
        super().__init__()
        self._sizes_wanted = {"num_train": num_train, "num_val": num_val, "num_test": num_test}
        for key, value in {"batch_size": batch_size, "eval_batch_size": eval_batch_size, **self._sizes_wanted}.items():
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, got {value}")
        if num_val is None and val_fraction is None:
            raise ValueError("validation needs val_fraction or num_val")
        if val_fraction is not None and not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must be between 0 and 1 (both excluded), got {val_fraction}")
        if padding < 0:
            raise ValueError(f"padding must be >= 0, got {padding}")
        self.left_out = {}
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.seed = seed
        self.padding = padding
        self.flip = flip
        # The training sets these before the first batch; None: an epoch is one pass.
        self.batches_per_epoch: int | None = None
        self.overfit_batches: int | None = None
        self._stream: BatchStream | None = None
        self._stream_state: dict[str, int] | None = None

    def load(self) -> ImageCorpus:
        """Read the published data set.

        Raises:
            UserError: it is missing or damaged.
        """
        raise NotImplementedError(f"{type(self).__name__} has no load(): choose a data set with data=...")

    def origin(self) -> str:
        """A digest of what the images were read from, found without reading them; "" if the settings fix the images.

        Raises:
            UserError: it is missing.
        """
        return ""

    def derived(self, images: Tensor, labels: Tensor, indices: Tensor, split: str) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and indices of a split ("train", "validation" or "test"), made from its published ones."""
        return images, labels, indices

    def take_draw(self, draw: int) -> None:
        """Take the images of a draw, 0, 1, 2, ...; the name of the data tells it.

        Raises:
            ValueError: it is negative.
        """
        if draw < 0:
            raise ValueError(f"draw={draw} must be at least 0")
        self.draw = draw
        if draw > 0:
            self.name += f", draw {draw}"

    def of_draw(self, purpose: str) -> str:
        """The seed of a choice of images: `purpose` itself in draw 0."""
        return purpose if self.draw == 0 else f"{purpose}, draw {self.draw}"

    def setup(self, stage: str | None = None) -> None:
        """Load and split; a second call keeps the tensors. For "fit" the training batches start at number 0."""
        if stage in (None, "fit"):
            self._stream = self._stream_state = None
        if hasattr(self, "test_images"):
            return
        corpus = self.load()
        corpus.validate(self.name)
        num_train, num_val, num_test = self._sizes(corpus)
        size = min(corpus.train_images.shape[2:])
        if self.padding > size:
            raise ValueError(f"padding={self.padding} is more than the images' {size} pixels: lower it, or set it to 0")
        labels = corpus.train_labels
        val = stratified_subset(labels, num_val, self.of_draw(_VALIDATION_SEED))
        train = torch.arange(len(labels))
        train = train[torch.isin(train, val, invert=True)]
        train = train[stratified_subset(labels[train], num_train, self.of_draw(_TRAINING_SUBSET_SEED))]
        test = stratified_subset(corpus.test_labels, num_test, self.of_draw(_TEST_SUBSET_SEED))
        self.class_names = corpus.class_names
        self.train_images, self.train_labels, self.train_indices = self.derived(
            corpus.train_images[train], labels[train], train, "train"
        )
        self.val_images, self.val_labels, self.val_indices = self.derived(
            corpus.train_images[val], labels[val], val, "validation"
        )
        self.mean, self.std = channel_statistics(self.train_images)
        images, self.test_labels, self.test_indices = self.derived(
            corpus.test_images[test], corpus.test_labels[test], test, "test"
        )
        # `test_images` comes last, because it marks the module as set up: after an interruption setup runs again.
        self.test_images = images

    def _sizes(self, corpus: ImageCorpus) -> tuple[int, int, int]:
        available = len(corpus.train_labels)
        num_train, num_val, num_test = self._sizes_wanted.values()
        if num_val is None:
            fraction = self.val_fraction or 0.0
            num_val = max(
                1, round(fraction * available if num_train is None else num_train * fraction / (1 - fraction))
            )
        if num_train is None:
            num_train = available - num_val
        if num_train < 1 or num_train + num_val > available:
            raise ValueError(
                f"{self.name} has {available} training images, too few to train on {max(num_train, 1)} and "
                f"keep {num_val} for validation: lower num_train, num_val or val_fraction"
            )
        num_test = num_test or len(corpus.test_labels)
        if num_test > len(corpus.test_labels):
            raise ValueError(f"{self.name} has {len(corpus.test_labels)} test images: lower num_test={num_test}")
        return num_train, num_val, num_test

    def _loaded(self, attribute: str) -> Any:
        if not hasattr(self, "test_images"):
            raise RuntimeError(f"{type(self).__name__}: call setup() first")
        return getattr(self, attribute)

    @property
    def num_classes(self) -> int:
        return len(self._loaded("class_names"))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, channels, height, width = self._loaded("train_images").shape
        return channels, height, width

    @property
    def num_train(self) -> int:
        return len(self._loaded("train_images"))

    @property
    def num_val(self) -> int:
        return len(self._loaded("val_images"))

    @property
    def num_test(self) -> int:
        return len(self._loaded("test_images"))

    @property
    def batches_per_pass(self) -> int:
        """Batches of one pass over the training images, without an incomplete one: max(1, num_train // batch_size)."""
        return max(1, self.num_train // self.batch_size)

    @property
    def device(self) -> torch.device:
        """The trainer's device while one is attached, otherwise the CPU."""
        return torch.device("cpu") if self.trainer is None else self.trainer.strategy.root_device

    def train_dataloader(self) -> BatchStream:
        """The endless training stream; every call during one fit returns the same object, which keeps its position.

        Its epochs have `batches_per_epoch` batches; with `overfit_batches` = n it repeats the first n batches.
        """
        if self._stream is None or self._stream.device != self.device:
            self._stream = BatchStream(
                self._loaded("train_images"),
                self.train_labels,
                self.batch_size,
                seed=self.seed,
                padding=self.padding,
                flip=self.flip,
                device=self.device,
                batches_per_epoch=self.batches_per_epoch,
                repeat=self.overfit_batches,
            )
            if self._stream_state is not None:
                self._stream.load_state_dict(self._stream_state)
        return self._stream

    def val_dataloader(self) -> BatchStream:
        return self._ordered("val")

    def test_dataloader(self) -> BatchStream:
        return self._ordered("test")

    def predict_dataloader(self) -> BatchStream:
        """The test images, for ``trainer.predict``."""
        return self._ordered("test")

    def _ordered(self, split: str) -> BatchStream:
        images, labels = self._loaded(f"{split}_images"), self._loaded(f"{split}_labels")
        return BatchStream(images, labels, self.eval_batch_size, shuffle=False, device=self.device)

    def state_dict(self) -> dict[str, Any]:
        """The position in the training stream; the Trainer restores it before it asks for the length of an epoch."""
        return {} if self._stream is None else {"stream": self._stream.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue the training batches at the saved position (checked when the stream is built)."""
        self._stream_state = state_dict.get("stream")
        if self._stream is not None and self._stream_state is not None:
            self._stream.load_state_dict(self._stream_state)
