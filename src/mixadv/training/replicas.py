"""Lightning's strategy for several processes that train one mixture."""

from pytorch_lightning.strategies import DDPStrategy


class Replicas(DDPStrategy):
    """Every process holds all members, unwrapped: training itself averages the gradients of those that it updates.

    DistributedDataParallel expects every parameter in every backward pass; Algorithm 2 updates one member at a time,
    and its attacks pass backward without updating any.
    """

    def configure_ddp(self) -> None:
        """Leave the module as it is: all processes have built or loaded the same."""
