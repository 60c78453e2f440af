"""``auto`` in data.batch_size, data.eval_batch_size and trainer.micro_batch_size: what the device's memory holds."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from mixadv.data.base import ImageDataModule
from mixadv.errors import UserError
from mixadv.losses import RobustLoss
from mixadv.mixture import Mixture
from mixadv.tasks import build, processes
from mixadv.tasks.choices import AUTO, Choices
from mixadv.training.memory import MemoryEstimate, attack_memory, training_memory

KEYS = ("batch_size", "eval_batch_size")
SMALLEST, LARGEST = 32, 512
# Estimates are not exact, and others use the memory too.
USED = 0.8


def build_data(cfg: DictConfig) -> ImageDataModule:
    """The data module, loaded and split; sizes that say ``auto`` are placeholders until they are settled.

    Raises:
        UserError: data missing or damaged, or settings out of range.
    """
    node = build.as_dict(cfg.data) if isinstance(cfg.data, DictConfig) else cfg.data
    return build.build_data({**node, **dict.fromkeys(_automatic(cfg), SMALLEST)} if _automatic(cfg) else cfg.data)


def _automatic(cfg: DictConfig) -> list[str]:
    """The keys of the data that say ``auto``."""
    return [key for key in KEYS if isinstance(cfg.data, DictConfig) and cfg.data.get(key) == AUTO]


def budget(cfg: DictConfig, device: torch.device) -> int | None:
    """Bytes that this process may use on `device`; None where the system does not tell."""
    free = build.available_memory(device)
    if free is None:
        return None
    # Processes on the CPU share its memory; of GPUs each has its own.
    return int(USED * free / (processes.devices(cfg) if device.type == "cpu" else 1))


@dataclass(frozen=True)
class Sizes:
    """What a training takes at once.

    Args:
        cfg: its settings. data: its images. recipe: of a member. loss: inner and outer loss.
        device: where it runs. bf16: whether under autocast.
    """

    cfg: DictConfig
    data: ImageDataModule
    recipe: dict[str, Any]
    loss: RobustLoss
    device: torch.device
    bf16: bool = False

    @cached_property
    def estimate(self) -> MemoryEstimate:
        """Of a training step, from one member that is measured."""
        (member,) = build.build_members(self.recipe, 1, self.cfg.seed, self.device).members
        shape, classes = self.data.image_shape, self.data.num_classes
        return training_memory(member, self.cfg.L, self.loss, shape, classes, self.device, bf16=self.bf16)

    def settle_batches(self, choices: Choices, console: Console) -> None:
        """Put numbers in the place of ``auto`` in the data module, and say which.

        data.batch_size becomes the largest power of two from 32 to 512 whose training step fits at once and which is
        not more than there are training images (32 where none fits: parts serve it), a multiple of the processes.
        """
        automatic, free = _automatic(self.cfg), budget(self.cfg, self.device)
        count = processes.number(self.cfg)
        if "batch_size" in automatic:

            def largest() -> int:
                size = LARGEST
                while size > SMALLEST and (
                    size > self.data.num_train
                    or (free is not None and self.estimate.needed(size, -(-size // count)) > free)
                ):
                    size //= 2
                return max(count, size // count * count)

            self.data.batch_size = choices.settle("data.batch_size", largest)
            console.print(f"data.batch_size=auto: batches of {self.data.batch_size} images", highlight=False)
        if "eval_batch_size" in automatic:
            mixture = build.build_members(self.recipe, self.cfg.L, self.cfg.seed, self.device)
            settle_evaluation(self.cfg, self.data, mixture, self.device, choices, console)

    def micro_batch_size(self, choices: Choices, console: Console) -> int | None:
        """Images per forward-backward pass: None where the whole of this process's share fits.

        Raises:
            UserError: not even one image fits.
        """
        wanted = self.cfg.trainer.micro_batch_size
        if wanted != AUTO:
            return wanted
        batch = min(self.data.batch_size, self.data.num_train)
        share = -(-batch // processes.number(self.cfg))
        free = budget(self.cfg, self.device)

        def largest() -> int:
            found = self.estimate.largest_part(batch, free, share)
            if found is None:
                raise UserError(
                    f"one image of a batch of {batch} needs {_gib(self.estimate.needed(batch, 1))} in training with "
                    f"L={self.cfg.L}, and {_gib(free)} may be used on the {self.device.type}: choose a smaller "
                    "data.batch_size, fewer members or a smaller model=..., or try trainer.micro_batch_size=1"
                )
            return found

        part = choices.settle("trainer.micro_batch_size", largest)
        if part >= share:
            return None
        console.print(
            f"Memory does not hold {share} images at once: batches are served in {-(-share // part)} parts of at most "
            f"{part} (trainer.micro_batch_size)",
            highlight=False,
            soft_wrap=True,
        )
        return part


def settle_evaluation(
    cfg: DictConfig, data: ImageDataModule, mixture: Mixture, device: torch.device, choices: Choices, console: Console
) -> None:
    """Put a number in the place of ``auto`` in data.eval_batch_size, or in data.batch_size where it stands for both.

    It is 512, halved until an attack in which all members take part at once fits, but at least 1.
    """
    keys = _automatic(cfg)
    key = "eval_batch_size" if "eval_batch_size" in keys else "batch_size"
    if key not in keys or (key == "batch_size" and cfg.data.get("eval_batch_size") is not None):
        return

    def largest() -> int:
        free = budget(cfg, device)
        needs = attack_memory(list(mixture.members), data.image_shape, data.num_classes, device)
        size = LARGEST
        while size > 1 and free is not None and needs.needed(size) > free:
            size //= 2
        return size

    data.eval_batch_size = choices.settle("data.eval_batch_size", largest)
    console.print(f"data.{key}=auto: attacks on {data.eval_batch_size} images at once", highlight=False)


def _gib(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 2**30:.2g} GiB"
