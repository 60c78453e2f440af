"""Groups of similar examples, for cuts that are summed over a group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Number of examples from which the splits are learned.
SAMPLE = 4096


@dataclass(frozen=True)
class Grouping:
    """A sequence of splits, each of one group in two: the examples with c_k > threshold form the new group.

    A cut that is summed over a group is exact only where all examples of the group change their best response
    together. So examples with similar losses form a group: c is the example's losses at one best response, minus
    their mean over the members (a loss that all members share does not change the weights).

    Attributes:
        splits: (group, member k, threshold) in order; split number s makes group s + 1.
        copies: if equal examples prevent further splits, each group is cut into this many by position.
    """

    splits: tuple[tuple[int, int, float], ...]
    copies: int

    @classmethod
    def learn(cls, losses: Tensor, num_groups: int) -> Grouping:
        """At most `num_groups` groups of examples with losses [n, L] at one response.

        Each split takes the group and the member with the largest sum of squared deviations, and splits at the mean.
        """
        points = _centred(losses).cpu().numpy()
        groups = [np.arange(len(points))]
        spreads = [_spread(points)]
        splits: list[tuple[int, int, float]] = []
        while len(groups) < num_groups:
            widest = max(range(len(groups)), key=lambda group: spreads[group][0])
            member = spreads[widest][1]
            column = points[groups[widest], member]
            above = column > column.mean()
            # Equal numbers may all be above their rounded mean.
            if above.all() or not above.any():
                break
            splits.append((widest, member, float(column.mean())))
            groups.append(groups[widest][above])
            groups[widest] = groups[widest][~above]
            spreads[widest] = _spread(points[groups[widest]])
            spreads.append(_spread(points[groups[-1]]))
        return cls(tuple(splits), max(1, num_groups // len(groups)))

    @property
    def num_groups(self) -> int:
        """The number of groups; some may be empty."""
        return (len(self.splits) + 1) * self.copies

    def assign(self, losses: Tensor, first: int = 0) -> Tensor:
        """The groups [n] of the examples first, first + 1, ... with losses [n, L]."""
        columns = _centred(losses).T.contiguous()
        group = torch.zeros(len(losses), dtype=torch.long, device=losses.device)
        for made, (split, member, threshold) in enumerate(self.splits, 1):
            group[(group == split) & (columns[member] > threshold)] = made
        position = torch.arange(first, first + len(losses), device=losses.device)
        return group * self.copies + position % self.copies


def _centred(losses: Tensor) -> Tensor:
    return losses - losses.mean(1, keepdim=True)


def _spread(points: np.ndarray) -> tuple[float, int]:
    """The largest sum of squares about the mean in one column, and that column."""
    squares = points.var(0) * len(points)
    member = int(squares.argmax())
    return float(squares[member]), member
