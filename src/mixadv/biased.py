"""Members that share one network and differ in a constant vector on their logits."""

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Biased(nn.Module):
    """x -> net(x) + b: the network `net` with a preference for some classes.

    Where `net` answers with a clear margin, a small b changes nothing. Between two classes it decides, and members with
    opposite b decide oppositely, so an attacker who does not see the draw fools only one of them. Members of a
    `Mixture` with the same `net` object share its passes.

    Args:
        net: x [B, ...] -> logits [B, C].
        bias: b, C finite numbers in units of the logits; the same number added to all of them changes no answer.

    Raises ValueError for fewer than two numbers, or numbers that are not finite; in a pass, for another C.
    """

    bias: Tensor

    def __init__(self, net: nn.Module, bias: Sequence[float] | Tensor) -> None:
        super().__init__()
        values = [float(value) for value in bias]
        if len(values) < 2 or not all(map(math.isfinite, values)):
            raise ValueError(f"the bias {values} must hold a finite number for each class")
        self.net = net
        self.register_buffer("bias", torch.tensor(values))

    def forward(self, x: Tensor) -> Tensor:
        """The logits [B, C]."""
        return self.added_to(self.net(x))

    def added_to(self, logits: Tensor) -> Tensor:
        """logits [B, C] of `net` -> those of this member.

        Raises:
            ValueError: C is not the number of biases.
        """
        if logits.shape[-1] != len(self.bias):
            raise ValueError(f"the network tells {logits.shape[-1]} classes apart, its bias has {len(self.bias)}")
        return logits + self.bias.to(logits.dtype)


def network_of(member: nn.Module) -> nn.Module:
    """The network behind a member: `net` of a `Biased`, else the member itself."""
    return member.net if isinstance(member, Biased) else member


def preferences(scales: Sequence[float], num_classes: int) -> dict[str, tuple[float, ...]]:
    """Biases that prefer the classes in some order, by name.

    For a scale beta and an order c_0 > c_1 > ... of the C classes, b[c_j] = beta ((C - 1) / 2 - j). The orders are the
    cyclic shifts of 0, ..., C - 1 and their reverses: C! orders would be too many, and among these every pair of
    classes is preferred in both directions.

    Args:
        scales: beta, each positive, in units of the logits.
        num_classes: C >= 2.

    Returns:
        2 C biases [C] for each scale (2 if C = 2), as ``0.3 (0>1>2)``, from C = 5 on as ``0.3 (0>1..9)``.
    """
    forward = [tuple((first + j) % num_classes for j in range(num_classes)) for first in range(num_classes)]
    orders = dict.fromkeys([*forward, *(order[::-1] for order in forward)])
    found = {}
    for scale, order in itertools.product(scales, orders):
        bias = [0.0] * num_classes
        for place, label in enumerate(order):
            bias[label] = scale * ((num_classes - 1) / 2 - place)
        shown = ">".join(map(str, order)) if num_classes < 5 else f"{order[0]}>{order[1]}..{order[-1]}"
        found[f"{scale:.12g} ({shown})"] = tuple(bias)
    return found


def listed(rows: Sequence[Sequence[float]]) -> dict[str, tuple[float, ...]]:
    """Biases that were given as numbers, by name: the numbers, or for five classes and more ``bias 0``, ``bias 1``."""
    return {
        f"({', '.join(f'{value:.12g}' for value in row)})" if len(row) < 5 else f"bias {k}": tuple(row)
        for k, row in enumerate(rows)
    }
