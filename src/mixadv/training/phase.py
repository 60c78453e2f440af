"""The game that the weights phases of a training play."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mixadv.attacks.search import Attack
from mixadv.data.base import ImageDataModule
from mixadv.data.split import stratified_subset
from mixadv.data.stream import BatchStream
from mixadv.errors import UserError
from mixadv.losses import RobustLoss, ZeroOne

PAYOFFS = ("loss", "zero_one")
# Of the choice of validation images: they are the same in every run.
SEED = 20210709


@dataclass(frozen=True)
class WeightsPhase:
    """What the mixture and the attacker play for in a weights phase of Algorithm 2, and where.

    The defaults are the published phase: the loss of the training, its PGD, the batch of the phase. With
    payoff="zero_one", attacks made for mixtures and some hundred validation images it is the step of BARRE that fits
    the sampling probabilities (Dbouk & Shanbhag, On the robustness of randomized ensembles to adversarial
    perturbations, ICML 2023).

    Args:
        payoff: l_k(x'): "loss", the outer loss of the training, or "zero_one", 1[f_k(x') != y].
        attacks: by name, what approximates the best response, all of them in every response; none stands for the PGD of
            the training. The payoff "zero_one" needs some: PGD on the averaged loss misses points that fool members
            together.
        num_images: the number of validation images to play on, the same ones in every phase, stratified by class; "all"
            of them; None for the batch of the phase. The epoch is chosen by validation images too, so the accuracy of
            validation favours weights that were fitted to them.

    Raises:
        ValueError: an argument is out of its range, or the payoff "zero_one" has no attacks.
    """

    payoff: str = "loss"
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    num_images: int | str | None = None

    def __post_init__(self) -> None:
        if self.payoff not in PAYOFFS:
            raise ValueError(f"payoff must be one of {', '.join(PAYOFFS)}, got {self.payoff!r}")
        if self.payoff == "zero_one" and not self.attacks:
            raise ValueError("payoff=zero_one needs attacks made for mixtures: attacks=[arc,subsets]")
        number = self.num_images
        if number in (None, "all"):
            return
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ValueError(
                f"num_images must be a whole number of at least 1, all, or None for the batch, got {number}"
            )

    @property
    def is_published(self) -> bool:
        """Whether the phase plays on its batch with the PGD of the training."""
        return not self.attacks and self.num_images is None

    def loss(self, training: RobustLoss) -> RobustLoss:
        """The loss whose outer part is the payoff; `training` is that of the training."""
        return ZeroOne() if self.payoff == "zero_one" else training

    def num_played(self, data: ImageDataModule) -> int:
        """The number of images that a phase plays on."""
        return data.num_val if self.num_images == "all" else int(self.num_images or data.batch_size)

    def images(self, data: ImageDataModule) -> tuple[Tensor, Tensor] | None:
        """The validation images [N, C, H, W] and labels [N], on the device of the data; None for the batch.

        Raises:
            UserError: there are fewer validation images.
        """
        if self.num_images is None:
            return None
        count = self.num_played(data)
        if count > data.num_val:
            raise UserError(
                f"lambda_solver.num_images={count}, but the validation split has {data.num_val} images: "
                "lower it, or raise data.num_val"
            )
        return fixed_images(data.val_images, data.val_labels, count, data.device)


def fixed_images(images: Tensor, labels: Tensor, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """`count` of the images [N, C, H, W] with their labels, stratified by class, the same ones in every run.

    Returns:
        [count, C, H, W] in [0, 1] and [count], on `device`.
    """
    chosen = stratified_subset(labels, count, SEED)
    (batch,) = BatchStream(images[chosen], labels[chosen], count, shuffle=False, device=device)
    return batch
