"""Validation metrics as torchmetrics, so that they reduce over processes."""

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanAccuracy(Metric):
    """Mean of per-example accuracies in [0, 1]: exact expected accuracies, or plain 0/1 correctness.

    Sums in float64 where the device has it, so the mean over a data set does not depend on the batching.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", default=torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", default=torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, accuracies: Tensor) -> None:
        """Add the per-example accuracies [B] of a batch."""
        self.total += accuracies.sum(dtype=torch.float64).to(self.total)
        self.count += accuracies.numel()

    def compute(self) -> Tensor:
        """The mean over all examples seen."""
        return self.total / self.count
