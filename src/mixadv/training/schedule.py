"""When a batch updates members and when it updates weights (Algorithm 2)."""

from dataclasses import dataclass
from typing import Any

import torch


def limited(limit: Any, count: int) -> int:
    """`count` batches cut by a limit of Lightning's Trainer: None, a number of batches, or a share in (0, 1]."""
    if limit is None:
        return count
    return min(count, limit) if isinstance(limit, int) else max(1, round(limit * count))


@dataclass(frozen=True)
class Schedule:
    """The phases of Algorithm 2 as a function of the batch counter t = 1, 2, ...

    ``sampled`` (as published): the batch t serves a weights phase when ``t mod (T_theta L + 1) = 0``, else one
    member, drawn uniformly, is updated. ``shared``: the weights phase comes when ``t mod (T_theta + 1) = 0``, else
    every member is updated on the same attacked batch. In both a member makes T_theta updates between phases (in
    expectation when sampled).

    Args:
        kind: "sampled" or "shared".
        num_members: L.
        T_theta: updates per member between two weights phases.
        weights_phases: False when the weights are fixed; then every batch updates members.

    Raises:
        ValueError: unknown kind, or a count below one.
    """

    kind: str
    num_members: int
    T_theta: int
    weights_phases: bool = True

    def __post_init__(self) -> None:
        if self.kind not in ("sampled", "shared"):
            raise ValueError(f"schedule kind {self.kind!r} is unknown: choose sampled or shared")
        if self.num_members < 1 or self.T_theta < 1:
            raise ValueError(f"L={self.num_members} and T_theta={self.T_theta} must be at least 1")

    @property
    def member_batches(self) -> int:
        """Batches that update members between two weights phases."""
        return self.T_theta * self.num_members if self.kind == "sampled" else self.T_theta

    @property
    def first_phase(self) -> int:
        """The batch t of the first weights phase, if there are any."""
        return self.member_batches + 1

    def is_weights_phase(self, t: int) -> bool:
        """Whether batch t (counted from 1) serves the weights."""
        return self.weights_phases and t % self.first_phase == 0

    def members_at(self, generator: torch.Generator) -> list[int]:
        """The members to update on a member batch: one uniform draw from `generator`, or all of them."""
        if self.kind == "shared":
            return list(range(self.num_members))
        return [int(torch.randint(self.num_members, (), generator=generator))]

    def batches_for(self, member_batches: int) -> int:
        """How many batches t it takes to serve `member_batches`, the weights phases that fall due included."""
        phases = member_batches // self.member_batches if self.weights_phases else 0
        return member_batches + phases

    def member_batches_in(self, batches: int) -> int:
        """How many of the batches 1..`batches` update members."""
        return batches - (batches // self.first_phase if self.weights_phases else 0)

    def batches_in_epoch(self, batches_per_pass: int, limit: Any = None) -> int:
        """Length of an epoch: `batches_per_pass` batches for every member, and the weights phases due for them.

        Sampled draws give each member that many updates in expectation. All epochs are equally long, so that one of
        them may have a weights phase more or less than it has room for, at the cost of a batch of the members.

        Args:
            batches_per_pass: batches in one pass over the training images.
            limit: ``limit_train_batches``, see `limited`.
        """
        whole = self.batches_for(batches_per_pass * (self.num_members if self.kind == "sampled" else 1))
        return limited(limit, whole)
