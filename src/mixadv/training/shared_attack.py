"""An attack whose images are divided among processes, and into parts that memory holds."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mixadv.attacks.objectives import TowardsClass
from mixadv.attacks.pgd import PGD
from mixadv.mixture import Mixture
from mixadv.mixture_game import MixtureGame
from mixadv.ranks import Ranks
from mixadv.threat_model import ThreatModel


def parts_of(count: int, most: int | None) -> Sequence[slice]:
    """`count` examples in as few consecutive parts of at most `most` (None: all in one) as can be, equal up to one."""
    number = 1 if most is None else max(1, -(-count // most))
    return [slice(count * i // number, count * (i + 1) // number) for i in range(number)]


@dataclass(frozen=True)
class SharedAttack:
    """PGD on a batch that every process holds; each attacks its own rows, part after part.

    Starts are drawn for the whole batch, by every process from its own copy of one generator, so that they are those
    of a single process and of a single part. `attack.restarts` must be 1: further starts are drawn as the search goes.

    Args:
        attack: what each process runs on its rows. ranks: the processes.
        micro_batch_size: the most images that one call of `attack` sees; None for no limit.
    """

    attack: PGD
    ranks: Ranks
    micro_batch_size: int | None = None

    def own_rows(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None,
        targets: Tensor | None = None,
    ) -> Tensor:
        """This process's rows of the attacked batch [rows, ...].

        Args:
            targets: classes [B] towards which the attack pulls the members, see `TowardsClass`; None: the objective is
                that of `attack`.
        """
        rows = self.ranks.rows(len(x))
        parts = parts_of(rows.stop - rows.start, self.micro_batch_size)
        if self.ranks.size == 1 and len(parts) == 1:
            return self._towards(targets)(mixture, x, y, threat_model, generator)
        start = self.attack.starting_points(x, threat_model, generator)
        x, y, start, ball = x[rows], y[rows], start[rows], threat_model.rows(rows)
        targets = None if targets is None else targets[rows]
        found = []
        for part in parts:
            attack = self._towards(None if targets is None else targets[part])
            found.append(attack(mixture, x[part], y[part], ball.rows(part), generator, start_at=start[part]))
        return found[0] if len(found) == 1 else torch.cat(found)

    def _towards(self, targets: Tensor | None) -> PGD:
        return self.attack if targets is None else replace(self.attack, objective=TowardsClass(targets))

    def __call__(
        self,
        mixture: Mixture,
        x: Tensor,
        y: Tensor,
        threat_model: ThreatModel,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """The whole attacked batch [B, ...], on every process."""
        return self.ranks.gather(self.own_rows(mixture, x, y, threat_model, generator), len(x))


class DividedGame(MixtureGame):
    """The game on a batch whose attacks divide it themselves: members see at most `micro_batch_size` images at once.

    `MixtureGame.batch_size` would also split the random starts and so change the result.

    Args:
        micro_batch_size: the most images in one call of a member; None for no limit. Others: see `MixtureGame`.
    """

    def __init__(self, *args: Any, micro_batch_size: int | None, **settings: Any) -> None:
        self._micro_batch_size = micro_batch_size
        super().__init__(*args, **settings)

    def _logits(self, x: Tensor) -> Tensor:
        parts = parts_of(len(x), self._micro_batch_size)
        if len(parts) == 1:
            return super()._logits(x)
        return torch.cat([self.mixture.member_logits(x[part]) for part in parts], dim=1)
