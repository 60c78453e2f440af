"""Weights of the classes in the loss of each member, so that members prefer different classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

ANTITHETIC = "antithetic"


@dataclass(frozen=True)
class ClassWeights:
    """The table W [L, C]: member k minimises the mean over the batch of W[k, y_i] times its outer loss on example i.

    Where the balls of two classes overlap, attacked examples of both arrive, and a member answers with the class of
    larger weight. Equal weights leave the members undecided in the same way, so that one point fools all of them.

    "antithetic": members 2j and 2j + 1 have an order of the classes and its reverse. With rank[c] the place of class c
    in order j, from 0, and r the ratio::

        W[2j, c] = r^rank[c] / m,   W[2j + 1, c] = r^(C - 1 - rank[c]) / m,   m = the mean of r^0, ..., r^(C - 1).

    So each row has the mean 1. The attacker and lambda do not see the weights.

    Args:
        class_weights: None (all weights are 1), "antithetic", or a table of L rows with C numbers of at least 0, which
            is used as it is.
        ratio: r, the weight of a class over that of the class before it.
        orders: for each pair of members the classes 0..C-1, that of least weight first. None: order j begins at class
            floor(j C / (L / 2)) and goes on with the next ones, 0 after C - 1.

    Raises:
        ValueError: an argument is out of its range.
    """

    class_weights: str | Sequence[Sequence[float]] | None = None
    ratio: float = 1.4
    orders: Sequence[Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.class_weights, str) and self.class_weights != ANTITHETIC:
            raise ValueError(f"class_weights={self.class_weights} is unknown: choose null, antithetic or a table")
        if not 0 < self.ratio < math.inf:
            raise ValueError(f"ratio={self.ratio} must be positive and finite")
        if self.orders is not None and self.class_weights != ANTITHETIC:
            raise ValueError("orders belong to class_weights=antithetic: choose it, or leave them out")

    def table(self, num_members: int, num_classes: int) -> Tensor:
        """W, float32 [L, C]. A single model (L = 1) has the first row of an antithetic pair.

        Raises:
            ValueError: the table or the orders do not fit, or the members cannot be paired.
        """
        if self.class_weights is None:
            return torch.ones(num_members, num_classes)
        if isinstance(self.class_weights, str):
            return self._antithetic(num_members, num_classes)
        rows = self.class_weights
        if len(rows) != num_members or any(len(row) != num_classes for row in rows):
            raise ValueError(
                f"class_weights has rows of {[len(row) for row in rows]} numbers: give {num_members} rows, one for "
                f"each member, of {num_classes} numbers, one for each class"
            )
        for row in rows:
            if any(not 0 <= weight < math.inf for weight in row) or not any(row):
                raise ValueError(f"class_weights has the row {list(row)}: give numbers of at least 0, not all 0")
        return torch.tensor(rows, dtype=torch.float32)

    def _antithetic(self, num_members: int, num_classes: int) -> Tensor:
        if num_members > 1 and num_members % 2:
            raise ValueError(
                f"class_weights=antithetic gives each order of the classes and its reverse to two members, and "
                f"L={num_members} is odd: choose an even L, or give a table"
            )
        powers = self.ratio ** torch.arange(num_classes, dtype=torch.float64)
        powers = powers / powers.mean()
        rows = []
        for order in self._orders(num_members, num_classes):
            row = torch.empty_like(powers)
            row[order] = powers
            reverse = torch.empty_like(powers)
            reverse[order] = powers.flip(0)
            rows += [row, reverse]
        return torch.stack(rows[:num_members]).float()

    def _orders(self, num_members: int, num_classes: int) -> list[Tensor]:
        pairs = max(1, num_members // 2)
        if self.orders is None:
            first = [j * num_classes // pairs for j in range(pairs)]
            return [torch.arange(start, start + num_classes) % num_classes for start in first]
        # A single model takes the first of the orders that its mixture has.
        if len(self.orders) != pairs and (num_members > 1 or not self.orders):
            raise ValueError(
                f"orders={[list(order) for order in self.orders]} has {len(self.orders)} orders: L={num_members} needs "
                f"{pairs}, one for every two members"
            )
        for order in self.orders:
            if sorted(order) != list(range(num_classes)):
                raise ValueError(f"orders has {list(order)}: give each of the classes 0..{num_classes - 1} once")
        return [torch.tensor(order) for order in self.orders[:pairs]]
