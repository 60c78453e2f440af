"""Several processes (ranks) that train or measure one mixture: how work is divided and results are combined."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from pytorch_lightning.plugins.environments import LightningEnvironment
from torch import Tensor

from mixadv.signals import Signals, Stopped


class OneProcess(LightningEnvironment):
    """The environment of a Trainer that runs in this process alone, whatever allocation surrounds it.

    Inside an allocation of Slurm, Lightning would check that its tasks fit the trainer's devices, and would take this
    process for one of them: all but task 0 write no logs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.set_global_rank(0)


@dataclass(frozen=True)
class Ranks:
    """The rank of this process among `size` processes.

    `gather`, `average_`, `largest`, `stop_together`, `take_from_first_` and `gather_objects` are collective: every
    process must call them, in the same order.

    Args:
        rank: 0, ..., size - 1.
        size: number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> "Ranks":
        """The ranks of torch.distributed's process group; a single process if there is none."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.get_rank(), dist.get_world_size())
        return cls()

    def rows(self, count: int) -> slice:
        """The consecutive examples, of `count`, that this process handles; shares differ by at most one example."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def serves(self, number: int) -> bool:
        """Whether this process handles batch `number`."""
        return number % self.size == self.rank

    def gather(self, share: Tensor, count: int) -> Tensor:
        """Join the shares of all processes in order: [rows, ...] from each -> [count, ...] on all."""
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
        """Replace every tensor by its mean over processes, with one all-reduce for all tensors."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([tensor.detach().flatten() for tensor in tensors])
        dist.all_reduce(flat)
        flat /= self.size
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.detach().copy_(part.view_as(tensor))

    def largest(self, number: int, device: torch.device | str = "cpu") -> int:
        """The maximum of `number` over all ranks."""
        if self.size == 1:
            return number
        found = torch.tensor(number, device=device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        return int(found)

    def stop_together(self, device: torch.device | str = "cpu") -> None:
        """Stop all processes if any of them received a signal.

        Raises:
            Stopped: one of them received a signal.
        """
        received = Signals.active.received if Signals.active is not None else None
        if wanted := self.largest(received or 0, device):
            raise Stopped(wanted)

    def take_from_first_(self, tensor: Tensor) -> None:
        """Replace the values of `tensor` by those of rank 0."""
        if self.size > 1:
            dist.broadcast(tensor, src=0)

    def gather_objects(self, thing: Any) -> list[Any]:
        """The `thing` of every process, by rank. Pickled, so only between processes of one run."""
        if self.size == 1:
            return [thing]
        things: list[Any] = [None] * self.size
        dist.all_gather_object(things, thing)
        return things
