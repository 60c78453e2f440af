"""Batches from images that live on the device, addressed by their position since the start of training."""

from collections.abc import Iterator

import torch
from torch import Tensor

from mixadv.data.augment import random_crop_flip
from mixadv.seeding import generator_for


class BatchStream:
    """Iterable over (x float32 in [0, 1] [B, C, H, W], y long [B]) on one device; x is exactly uint8 / 255.

    Training (`shuffle=True`) is one endless stream of batches numbered 0, 1, 2, ... With n = max(1, N //
    batch_size) batches per pass, batch c belongs to pass p = c // n and holds rows c mod n of the permutation
    drawn from (seed, p); its crops and flips are drawn from (seed, c). So the number c alone determines the
    batch, whatever was served before, on which device and however often the run was stopped. Of each pass the
    last N mod batch_size examples of its permutation are left out (if N < batch_size, the pass is one batch
    of N examples).

    An epoch is `batches_per_epoch` consecutive batches (one pass if None). `iter()` serves what is left of the
    current epoch, and `close_epoch` begins the next one. A training that was stopped after the last batch of an epoch
    but before its validation goes on with an epoch that has no batch left: `iter()` then serves one batch of no
    examples, so that the trainer ends this epoch and validates.

    With `shuffle=False` every `iter()` serves all examples once in their order, the last batch may be
    smaller, and the position stays 0.

    Args:
        images: uint8 [N, C, H, W], N >= 1.
        labels: integers [N].
        batch_size: at least 1.
        shuffle: training or ordered.
        seed: of permutations and augmentation.
        padding, flip: see `random_crop_flip`; training only.
        device: where the images are kept and the batches appear.
        batches_per_epoch: at least 1; training only.
        repeat: serve the first `repeat` batches again and again (Lightning's ``overfit_batches``); training only.

    Raises:
        ValueError: wrong shapes or dtypes, N = 0, batch_size < 1, an epoch without batches, or augmentation
            of an ordered stream.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        batch_size: int,
        *,
        shuffle: bool = True,
        seed: int = 0,
        padding: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        batches_per_epoch: int | None = None,
        repeat: int | None = None,
    ) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(f"images must be uint8 [N, C, H, W], got {images.dtype} {tuple(images.shape)}")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"{len(images)} images need labels [{len(images)}], got {tuple(labels.shape)}")
        if len(images) == 0:
            raise ValueError("a stream of batches needs at least one image")
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        if padding < 0:
            raise ValueError(f"padding must be >= 0, got {padding}")
        if not shuffle and (padding or flip or batches_per_epoch is not None or repeat is not None):
            raise ValueError("padding, flip, batches_per_epoch and repeat are for a training stream (shuffle=True)")
        for name, count in (("batches_per_epoch", batches_per_epoch), ("repeat", repeat)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = labels.to(self.device, torch.long)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.batches_per_epoch = batches_per_epoch or self.batches_per_pass
        self.repeat = repeat
        # Batches served, and epochs closed, since the start of training.
        self.position = self.epoch = 0
        self._order: tuple[int, Tensor] | None = None
        # On CUDA a division by a Python number is a product with its rounded reciprocal, off by one ulp for
        # some pixels; a divisor on the device is a true division.
        self._full_scale = torch.tensor(255.0, device=self.device)

    @property
    def batches_per_pass(self) -> int:
        count = len(self.images)
        return max(1, count // self.batch_size) if self.shuffle else -(-count // self.batch_size)

    @property
    def batches_left(self) -> int:
        """Batches of the current epoch that are still to come; 0 between its last batch and `close_epoch`."""
        return (self.epoch + 1) * self.batches_per_epoch - self.position

    def __len__(self) -> int:
        """Batches that the next `iter()` serves."""
        return max(1, self.batches_left) if self.shuffle else self.batches_per_pass

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            for start in range(0, len(self.images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield self._scaled(self.images[rows]), self.labels[rows]
            return
        if not self.batches_left:
            yield self._scaled(self.images[:0]), self.labels[:0]
        while self.batches_left:
            batch = self._training_batch(self.position % self.repeat if self.repeat else self.position)
            # Counted before it is handed over: a checkpoint written while the batch is in use includes it.
            self.position += 1
            yield batch

    def end_epoch(self) -> None:
        """Leave out the batches that the current epoch still has: the training ends with it."""
        self.position = (self.epoch + 1) * self.batches_per_epoch

    def close_epoch(self) -> None:
        """End the current epoch: the next `iter()` serves the next one."""
        self.epoch += 1

    def take_back(self) -> None:
        """The last batch was not used: serve it again."""
        self.position -= 1

    def _scaled(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(self._full_scale)

    def _training_batch(self, number: int) -> tuple[Tensor, Tensor]:
        pass_number, place = divmod(number, self.batches_per_pass)
        if self._order is None or self._order[0] != pass_number:
            # Drawn on the CPU, so that the order is the same on every device.
            draws = generator_for(self.seed, "order", pass_number)
            order = torch.randperm(len(self.images), generator=draws).to(self.device)
            self._order = (pass_number, order)
        rows = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        images = self.images[rows]
        if self.padding or self.flip:
            images = random_crop_flip(images, self.padding, self.flip, generator_for(self.seed, "augment", number))
        return self._scaled(images), self.labels[rows]

    def state_dict(self) -> dict[str, int]:
        """Batches served (`position`) and epochs closed (`epoch`), and what gives these numbers their meaning."""
        return {"position": self.position, "epoch": self.epoch, **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the saved position.

        Raises:
            ValueError: the state belongs to another seed, batch size, number of examples or length of epochs.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(
                    f"cannot resume the batches: the checkpoint has {key}={state[key]}, this run {mine}; "
                    "resume with the same settings or start anew"
                )
        self.position, self.epoch = state["position"], state["epoch"]

    def _identity(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "batch_size": self.batch_size,
            "num_examples": len(self.images),
            "batches_per_epoch": self.batches_per_epoch,
        }
