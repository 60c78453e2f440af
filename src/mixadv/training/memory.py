"""How much memory a training step or an attack takes, estimated before it runs from two small batches.

What autograd keeps of a forward pass is nearly everything that a pass needs, and grows with its images n as a + b n. It
is counted with ``torch.autograd.graph.saved_tensors_hooks`` at two sizes, each storage once.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mixadv.losses import AT, RobustLoss
from mixadv.training.generators import same_draws

FLOAT32 = 4
# Parameter, gradient and momentum.
TENSORS_PER_PARAMETER = 3
SIZES = (2, 4)
# Beside what autograd keeps, a backward pass holds gradients, copies in the layout of the convolutions, and gaps: so
# many times the largest tensor (measured on the CPU, benchmarks/memory.py).
WORKING_TENSORS = 10
# Tensors of the shape of the batch: images, starts, attacked images, before and after the parts are joined; and of the
# shape of a part in a step of an attack: iterate, gradient, its sign, both ends of the ball.
BATCH_TENSORS = 6
ATTACK_TENSORS = 12
# What libraries take for themselves.
WORKSPACE = {"cpu": 2**26, "cuda": 2**28}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a batch of B images takes, at most N of them in one pass: fixed + B per_batch_image + N per_image.

    Args:
        fixed: what is there whatever the batch. per_batch_image: for each image of the batch, whatever the parts.
        per_image: for each image of one forward-backward pass.
    """

    fixed: int
    per_batch_image: float
    per_image: float

    def needed(self, batch: int, part: int | None = None) -> int:
        """Bytes for `batch` images of which `part` (all of them if None) are in one pass."""
        part = batch if part is None else min(part, batch)
        return math.ceil(self.fixed + self.per_batch_image * batch + self.per_image * part)

    def largest_part(self, batch: int, budget: int | None, share: int | None = None) -> int | None:
        """The most images per pass that `budget` bytes hold, such that parts are equal where that costs little.

        The number of parts is the smallest that fits, or the next that divides the images if there is one below twice
        as many.

        Args:
            batch: images of the batch. budget: bytes; None for no limit.
            share: images of the batch that this process serves; None for all.

        Returns:
            None where not even one image fits.
        """
        share = batch if share is None else share
        if budget is None or self.needed(batch, share) <= budget:
            return share
        most = int((budget - self.needed(batch, 0)) // self.per_image)
        if most < 1:
            return None
        parts = -(-share // most)
        dividing = next((count for count in range(parts, min(2 * parts, share + 1)) if share % count == 0), parts)
        return -(-share // dividing)


def training_memory(
    member: nn.Module,
    num_members: int,
    loss: RobustLoss,
    image_shape: Sequence[int],
    num_classes: int,
    device: torch.device,
    *,
    bf16: bool = False,
) -> MemoryEstimate:
    """A step of adversarial training of `num_members` members like `member`, one of them in a pass at a time.

    The member is measured on a copy, on `device`, in its update (train mode) and in the attack (eval mode, frozen); the
    larger counts. Random states are left as they are. Parameters count with gradient and momentum.

    Args:
        member: one of the members. num_members: L. loss: inner and outer loss.
        image_shape: [C, H, W] of an image. num_classes: of the labels.
        device: where it will run. bf16: whether under autocast to bfloat16.
    """
    parameters = sum(p.numel() * p.element_size() for p in member.parameters())

    def update(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        net.train().requires_grad_(True)
        clean = net(x) if loss.needs_clean else None
        # As an attacked batch: another tensor than x.
        return loss.outer(net(x.clone()), clean, y).mean()

    passes = [_per_image(member, run, image_shape, num_classes, device, bf16) for run in (update, _attack(loss))]
    fixed, per_image = max(passes, key=lambda found: found[1])
    image = FLOAT32 * math.prod(image_shape)
    return MemoryEstimate(
        fixed=math.ceil(fixed) + TENSORS_PER_PARAMETER * num_members * parameters + _workspace(device),
        per_batch_image=BATCH_TENSORS * image,
        per_image=per_image + ATTACK_TENSORS * image,
    )


def attack_memory(
    members: Sequence[nn.Module], image_shape: Sequence[int], num_classes: int, device: torch.device
) -> MemoryEstimate:
    """An attack on a mixture whose members take part in every pass together, as objectives that join them demand.

    Args:
        members: all of them. image_shape: [C, H, W]. num_classes: of the labels. device: where it will run.
    """
    found = [_per_image(member, _attack(AT()), image_shape, num_classes, device, False) for member in members]
    parameters = sum(p.numel() * p.element_size() for member in members for p in member.parameters())
    image = FLOAT32 * math.prod(image_shape)
    return MemoryEstimate(
        fixed=math.ceil(sum(constant for constant, _ in found)) + parameters + _workspace(device),
        per_batch_image=BATCH_TENSORS * image,
        per_image=sum(slope for _, slope in found) + ATTACK_TENSORS * image,
    )


def _workspace(device: torch.device) -> int:
    return WORKSPACE.get(device.type, max(WORKSPACE.values()))


def _attack(loss: RobustLoss) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    def run(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        net.eval().requires_grad_(False)
        with torch.no_grad():
            clean = net(x) if loss.needs_clean else None
        return loss.inner(net(x.clone().requires_grad_(True)), clean, y).sum()

    return run


def _per_image(
    member: nn.Module,
    run: Callable[[nn.Module, Tensor, Tensor], Tensor],
    image_shape: Sequence[int],
    num_classes: int,
    device: torch.device,
    bf16: bool,
) -> tuple[float, float]:
    """(a, b) of a + b n: bytes that autograd keeps of a pass over n images, and works with beside them."""
    net = copy.deepcopy(member).to(device)
    own = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    totals, largest = [], []
    with same_draws(device), torch.inference_mode(False), torch.enable_grad():
        for count in SIZES:
            x = torch.full((count, *image_shape), 0.5, device=device)
            y = torch.arange(count, device=device) % num_classes
            kept: dict[int, int] = {}

            def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in own:
                    kept[storage.data_ptr()] = storage.nbytes()
                return tensor

            autocast = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
            # The result holds the graph, and so the tensors whose addresses are told apart.
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                result = run(net, x, y)
            del result
            totals.append(sum(kept.values()))
            largest.append(max(kept.values(), default=0))
    steps = SIZES[1] - SIZES[0]
    slope = max(0.0, (totals[1] - totals[0]) / steps)
    working = WORKING_TENSORS * max(0.0, (largest[1] - largest[0]) / steps)
    return max(0.0, totals[0] - slope * SIZES[0]), slope + working
