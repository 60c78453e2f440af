"""Groups of examples whose responses resemble each other, for cuts that are summed over a group."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Examples from which the splits are learned.
SAMPLE = 4096


@dataclass(frozen=True)
class Grouping:
    """A tree of splits, each of one group in two: the examples with c_k > threshold become a group of their own.

    A cut that is summed over a group follows the maximum of each of its examples only where all of them change
    their best response together. So examples belong together that tell the members apart in the same way: c is
    the example's losses at one best response, less their mean over the members (a loss that all members share
    does not move the weights).

    Attributes:
        splits: (group, member k, threshold) in order; split number s makes group s + 1.
        copies: groups that cannot be split so, because their examples agree, are cut into this many by position.
    """

    splits: tuple[tuple[int, int, float], ...]
    copies: int

    @classmethod
    def learn(cls, losses: Tensor, num_groups: int) -> Grouping:
        """At most `num_groups` groups of examples with losses [n, L] at one response: the group whose losses vary
        most, summed over its examples, is split at its mean along the member where they do, again and again.
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
            # Equal numbers may all be above their mean, by rounding.
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
        """How many there are; some may be empty."""
        return (len(self.splits) + 1) * self.copies

    def assign(self, losses: Tensor, first: int = 0) -> Tensor:
        """The group [n] of each of the examples first, first + 1, ... with losses [n, L]."""
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
