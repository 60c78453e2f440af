"""When a batch updates members and when it updates weights (Algorithm 2, and mixtures that grow)."""

from dataclasses import dataclass
from typing import Any

import torch

KINDS = ("sampled", "shared", "grow")


def limited(limit: Any, count: int) -> int:
    """`count` batches cut by a limit of Lightning's Trainer: None, a number of batches, or a share in (0, 1]."""
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else max(1, round(limit * count))


@dataclass(frozen=True)
class Schedule:
    """The phases of a training as a function of the batch counter t = 1, 2, ...

    ``sampled`` (Algorithm 2 as published): the batch t serves a weights phase when ``t mod (T_theta L + 1) = 0``, else
    one member, drawn uniformly, is updated. ``shared``: the weights phase comes when ``t mod (T_theta + 1) = 0``, else
    every member is updated on the same attacked batch. In both a member makes T_theta updates between phases (in
    expectation when sampled).

    ``grow``: the T batches of the training are L stages of equal length (up to one batch); stage s ends with batch
    floor((s + 1) T / L). Its last batch serves the weights, the others update member s alone.

    Args:
        kind: "sampled", "shared" or "grow".
        num_members: L.
        T_theta: updates per member between two weights phases; ``grow`` does not read it.
        weights_phases: False when the weights are fixed; then every batch updates members.
        total_batches: T, which ``grow`` needs to know its stages.

    Raises:
        ValueError: unknown kind, or a count below one.
    """

    kind: str
    num_members: int
    T_theta: int
    weights_phases: bool = True
    total_batches: int = 0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"schedule kind {self.kind!r} is unknown: choose sampled, shared or grow")
        if self.num_members < 1 or self.T_theta < 1:
            raise ValueError(f"L={self.num_members} and T_theta={self.T_theta} must be at least 1")

    @property
    def grows(self) -> bool:
        """Whether members join one after the other."""
        return self.kind == "grow" and self.num_members > 1

    @property
    def updated_at_once(self) -> int:
        """The members that a member batch updates."""
        return self.num_members if self.kind == "shared" else 1

    @property
    def member_batches(self) -> int:
        """Batches that update members between two weights phases of Algorithm 2."""
        return self.T_theta * self.num_members if self.kind == "sampled" else self.T_theta

    @property
    def first_phase(self) -> int:
        """The batch t of the first weights phase, if there are any."""
        return self.total_batches // self.num_members if self.grows else self.member_batches + 1

    def stage_at(self, t: int) -> int:
        """The stage to which batch t belongs, 0..L-1; -1 for t = 0. Only when growing."""
        return -(-t * self.num_members // self.total_batches) - 1

    def is_weights_phase(self, t: int) -> bool:
        """Whether batch t (counted from 1) serves the weights."""
        if self.grows:
            return self.weights_phases and self.stage_at(t + 1) > self.stage_at(t)
        return self.weights_phases and t % self.first_phase == 0

    def members_at(self, t: int, generator: torch.Generator) -> list[int]:
        """The members to update on the member batch t: one uniform draw from `generator`, all, or that of the stage."""
        if self.grows:
            return [self.stage_at(t)]
        if self.kind == "sampled":
            return [int(torch.randint(self.num_members, (), generator=generator))]
        return list(range(self.num_members))

    def batches_for(self, member_batches: int) -> int:
        """How many batches t it takes to serve `member_batches`, the weights phases that fall due included.

        When growing, a weights phase takes the place of the last member batch of its stage.
        """
        phases = member_batches // self.member_batches if self.weights_phases and not self.grows else 0
        return member_batches + phases

    def member_batches_in(self, batches: int) -> int:
        """How many of the batches 1..`batches` update members; when growing, `batches` is the whole training."""
        if not self.weights_phases:
            return batches
        return batches - (self.num_members if self.grows else batches // self.first_phase)

    def batches_in_epoch(self, batches_per_pass: int, limit: Any = None) -> int:
        """Length of an epoch: `batches_per_pass` batches for every member, and the weights phases due for them.

        Sampled draws give each member that many updates in expectation. All epochs are equally long, so that one of
        them may have a weights phase more or less than it has room for, at the cost of a batch of the members.
        When growing, an epoch has L passes too, all of them for the member of the stage, so that E epochs are E passes
        for every member.

        Args:
            batches_per_pass: batches in one pass over the training images.
            limit: ``limit_train_batches``, see `limited`.
        """
        whole = self.batches_for(batches_per_pass * self.num_members // self.updated_at_once)
        return limited(limit, whole)
