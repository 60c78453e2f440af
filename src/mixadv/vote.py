"""The vote of a mixture's members: the deterministic classifier that hears all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mixadv.correctness import answered

# For comparing sums of weights.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Vote:
    """argmax_c sum_k lambda_k 1[f_k = c]; for two classes 1[sum_k lambda_k 1[f_k = 1] > a] if a threshold a is given.

    A tie goes to the answer of the tied members' first one in the order of decreasing weight. So with L = 2, or if one
    member has more than half of the weight, the vote without a threshold is the heaviest member. A member without an
    answer (logits that are not finite) votes for class -1, which is always wrong; with a threshold it votes for neither
    class.

    For two classes some vote with a threshold is at least as robust as the mixture: Gnecco-Heredia, Pydi, Meunier,
    Negrevergne, Chevaleyre (NeurIPS 2023, arXiv 2302.07221).

    weights: lambda, L numbers.
    threshold: a; None: the most votes win.
    """

    weights: tuple[float, ...]
    threshold: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """The answers [B] to the members' logits [L, B, C]; -1 is none."""
        return self.of(torch.where(answered(logits), logits.argmax(-1), -1))

    def of(self, answers: Tensor) -> Tensor:
        """The answers [B] where the members answer [L, B]."""
        lam = torch.tensor(self.weights, dtype=torch.float64, device=answers.device)
        if self.threshold is not None:
            ones, zeros = (lam @ (answers == c).to(lam) for c in (1, 0))
            low = torch.where(zeros >= 1 - self.threshold - TOLERANCE, 0, -1)
            return torch.where(ones > self.threshold + TOLERANCE, 1, low)
        order = torch.argsort(lam, descending=True, stable=True)
        answers = answers[order]
        # [L, B]: the weight of the members that answer as member k does.
        support = torch.stack([lam[order] @ (answers == one).to(lam) for one in answers])
        first = (support >= support.amax(0) - TOLERANCE).to(torch.uint8).argmax(0)
        return answers.gather(0, first[None])[0]

    def to_turn(self, y: Tensor) -> Tensor:
        """The least weight of members that, wrong in the same way, always turn the vote against the label: [B]."""
        if self.threshold is None:
            # Half of the weight may be a tie.
            return torch.full(y.shape, 0.5 + 2 * TOLERANCE, dtype=torch.float64, device=y.device)
        above, below = 1 - self.threshold - TOLERANCE, self.threshold + 2 * TOLERANCE
        return torch.where(y == 1, above, below)
