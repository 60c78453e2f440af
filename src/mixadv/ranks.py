"""Several processes that train or measure one mixture together: who does what, and how the parts come together."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mixadv.signals import Signals, Stopped


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size`. Methods that bring parts together are collective: all call them, in step.

    Args:
        rank: 0, ..., size - 1. size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """Those of the process group that torch.distributed has set up; one process without it."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rows(self, count: int) -> slice:
        """This process's share of `count` examples: consecutive, sizes differ by one at most."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def serves(self, number: int) -> bool:
        """Whether batch `number` is this process's."""
        return number % self.size == self.rank

    def gather(self, share: Tensor, count: int) -> Tensor:
        """All shares of `count` examples in their order: [rows, ...] of each -> [count, ...] on all."""
        if self.size == 1:
            return share
        largest = -(-count // self.size)
        padded = share.new_zeros(largest, *share.shape[1:])
        padded[: len(share)] = share
        parts = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        lengths = [rows.stop - rows.start for rows in (Ranks(k, self.size).rows(count) for k in range(self.size))]
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over processes in the place of every tensor, with one message for all of them."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def largest(self, number: int, device: torch.device | str = "cpu") -> int:
        """The largest of all processes' numbers."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def stop_together(self, device: torch.device | str = "cpu") -> None:
        """Stop everybody if a signal has come to anybody.

        Raises:
            Stopped: it has.
        """
        received = Signals.active.received if Signals.active is not None else None
        if wanted := self.largest(received or 0, device):
            raise Stopped(wanted)

    def take_from_first_(self, tensor: Tensor) -> None:
        """Put process 0's values in the place of everybody's."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather_objects(self, thing: Any) -> list[Any]:
        """Everybody's `thing`, by rank; our own processes' objects, pickled."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things
