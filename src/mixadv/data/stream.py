"""Batches from images that live on the device, addressed by their position since the start of training."""

import hashlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mixadv.data.augment import random_crop_flip


def seeded_generator(*key: int | str) -> torch.Generator:
    """A generator whose state is a function of `key` alone; on the CPU, so that all devices see its draws."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=7).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big"))


class BatchStream:
    """Iterable over (x float32 in [0, 1] [B, C, H, W], y long [B]) on one device; x is exactly uint8 / 255.

    Training (`shuffle=True`) is one endless stream of batches numbered 0, 1, 2, ... With n = max(1, N //
    batch_size) batches per pass, batch c belongs to pass p = c // n and holds rows c mod n of the permutation
    drawn from (seed, p); its crops and flips are drawn from (seed, c). So the number c alone determines the
    batch, whatever was served before, on which device and however often the run was stopped. Of each pass the
    last N mod batch_size examples of its permutation are left out (if N < batch_size, the pass is one batch
    of N examples).

    An epoch e is `batches_in_epoch(e)` consecutive batches (one pass if None); `iter()` serves what is left
    of the current epoch, or the next one when the last is finished. Whoever saves the state between an epoch's last
    batch and what follows an epoch (validation) leaves it open; a stream that continues there serves one batch of no
    examples, and what follows comes to pass. `close_epoch` says that it has.

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
        batches_in_epoch: epoch number -> number of batches, at least 1; training only. `len` also
            asks for the epoch after the last one, so it has to answer for every number.

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
        batches_in_epoch: Callable[[int], int] | None = None,
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
        if not shuffle and (padding or flip or batches_in_epoch is not None):
            raise ValueError("padding, flip and batches_in_epoch belong to a training stream (shuffle=True)")
        self.device = torch.device(device)
        self.images = images.to(self.device)
        self.labels = labels.to(self.device, torch.long)
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.padding = padding
        self.flip = flip
        self.batches_in_epoch = batches_in_epoch
        self.position = 0
        self._open = False
        self._owes_an_end = False
        self._epoch_ends: list[int] = []
        self._order: tuple[int, Tensor] | None = None
        # On CUDA a division by a Python number is a product with its rounded reciprocal, off by one ulp for
        # some pixels; a divisor on the device is a true division.
        self._full_scale = torch.tensor(255.0, device=self.device)

    @property
    def batches_per_pass(self) -> int:
        count = len(self.images)
        return max(1, count // self.batch_size) if self.shuffle else -(-count // self.batch_size)

    @property
    def epoch(self) -> int:
        """Number of the epoch that the next batch belongs to."""
        if self.batches_in_epoch is None:
            return self.position // self.batches_per_pass
        while not self._epoch_ends or self._epoch_ends[-1] <= self.position:
            epoch = len(self._epoch_ends)
            length = self.batches_in_epoch(epoch)
            if length < 1:
                raise ValueError(f"epoch {epoch} must have at least one batch, batches_in_epoch gave {length}")
            self._epoch_ends.append(length + (self._epoch_ends[-1] if self._epoch_ends else 0))
        return next(epoch for epoch, end in enumerate(self._epoch_ends) if end > self.position)

    def _epoch_end(self) -> int:
        epoch = self.epoch
        return (epoch + 1) * self.batches_per_pass if self.batches_in_epoch is None else self._epoch_ends[epoch]

    def _at_an_end(self) -> bool:
        if self.batches_in_epoch is None:
            return self.position > 0 and self.position % self.batches_per_pass == 0
        return self.epoch > 0 and self._epoch_ends[self.epoch - 1] == self.position

    def __len__(self) -> int:
        """Batches that the next `iter()` serves."""
        if not self.shuffle:
            return self.batches_per_pass
        return 1 if self._owes_an_end else self._epoch_end() - self.position

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if not self.shuffle:
            for start in range(0, len(self.images), self.batch_size):
                rows = slice(start, start + self.batch_size)
                yield self._scaled(self.images[rows]), self.labels[rows]
            return
        if self._owes_an_end:
            self._owes_an_end, self._open = False, True
            yield self._scaled(self.images[:0]), self.labels[:0]
            return
        end = self._epoch_end()
        while self.position < end:
            batch = self._training_batch(self.position)
            # Counted before it is handed over: a checkpoint written while the batch is in use includes it.
            self.position += 1
            self._open = True
            yield batch

    @property
    def epoch_under_way(self) -> int:
        """Number of the epoch that is not closed; between epochs, of the next."""
        return self.epoch - int(self._open and self._at_an_end())

    @property
    def between_epochs(self) -> bool:
        """Whether no epoch is under way: none has begun yet, or the last one is closed."""
        return not self._open

    def close_epoch(self) -> None:
        """What follows an epoch has been done."""
        self._open = False

    def take_back(self) -> None:
        """The last batch was not used: serve it again."""
        self.position -= 1
        self._open = self.position > 0 and not self._at_an_end()

    def _scaled(self, images: Tensor) -> Tensor:
        return images.to(torch.float32).div_(self._full_scale)

    def _training_batch(self, number: int) -> tuple[Tensor, Tensor]:
        pass_number, place = divmod(number, self.batches_per_pass)
        if self._order is None or self._order[0] != pass_number:
            generator = seeded_generator(self.seed, "order", pass_number)
            order = torch.randperm(len(self.images), generator=generator).to(self.device)
            self._order = (pass_number, order)
        rows = self._order[1][place * self.batch_size : (place + 1) * self.batch_size]
        images = self.images[rows]
        if self.padding or self.flip:
            generator = seeded_generator(self.seed, "augment", number)
            images = random_crop_flip(images, self.padding, self.flip, generator)
        return self._scaled(images), self.labels[rows]

    def state_dict(self) -> dict[str, int]:
        """`position` = batches served since the start of training, `open` = 1 while their last epoch is not closed,
        and what gives these numbers their meaning.
        """
        return {"position": self.position, "open": int(self._open), **self._identity()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at the saved position.

        Raises:
            ValueError: the state belongs to another seed, batch size or number of examples.
        """
        for key, mine in self._identity().items():
            if state[key] != mine:
                raise ValueError(
                    f"cannot resume the batches: the checkpoint has {key}={state[key]}, this run {mine}; "
                    "resume with the same settings or start anew"
                )
        self.position, self._open = state["position"], bool(state["open"])
        self._owes_an_end = self._open and self._at_an_end()

    def _identity(self) -> dict[str, int]:
        return {"seed": self.seed, "batch_size": self.batch_size, "num_examples": len(self.images)}
