"""Estimates the time of a training from timed steps on a few images."""

import copy
import time

import torch
from torch import Tensor

from mixadv import seeding
from mixadv.mixture import Mixture
from mixadv.training import MixtureTraining

# A step that takes at least this long, in seconds, is extrapolated without timing more images.
ENOUGH_SECONDS = 1.0


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _step(module: MixtureTraining, mixture: Mixture, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    x_adv = module.training_attack(mixture, x, y, module.threat_model, generator)
    stepped = mixture.members if module.schedule.kind == "shared" else mixture.members[:1]
    for member in stepped:
        member.train()
        clean = member(x) if module.loss.needs_clean else None
        module.loss.outer(member(x_adv), clean, y).mean().backward()


def seconds_per_batch(
    module: MixtureTraining,
    image_shape: tuple[int, int, int],
    num_classes: int,
    batch_size: int,
    device: torch.device,
) -> float:
    """Seconds of one members step on a batch of `batch_size` images, extrapolated from fewer images.

    Times a step on two images, then on four times as many until it takes `ENOUGH_SECONDS`. The rest is extrapolated by
    the seconds per further image, so that the fixed cost of a step counts once. The steps use a copy of the members and
    their own generators, so the training that follows is not changed.

    Args:
        module: the training to time.
        image_shape: (C, H, W).
        num_classes: of the data.
        batch_size: images per batch.
        device: where the training runs.
    """
    mixture = copy.deepcopy(module.mixture).to(device)
    generator = seeding.generator_for(0, "estimate", device=device)

    def timed(count: int) -> float:
        x = torch.rand(count, *image_shape, generator=generator, device=device)
        y = torch.randint(num_classes, (count,), generator=generator, device=device)
        # The first call includes the one-time setup of libraries.
        return min(_timed(module, mixture, x, y, generator, device) for _ in range(2))

    count = min(2, batch_size)
    seconds = timed(count)
    per_image = seconds / count
    while count < batch_size and seconds < ENOUGH_SECONDS:
        more = min(4 * count, batch_size)
        longer = timed(more)
        per_image = max(0.0, longer - seconds) / (more - count)
        count, seconds = more, longer
    return seconds + per_image * (batch_size - count)


def _timed(
    module: MixtureTraining,
    mixture: Mixture,
    x: Tensor,
    y: Tensor,
    generator: torch.Generator,
    device: torch.device,
) -> float:
    _synchronize(device)
    started = time.perf_counter()
    _step(module, mixture, x, y, generator)
    _synchronize(device)
    return time.perf_counter() - started


def in_words(seconds: float) -> str:
    """A duration in its largest suitable unit: `40 seconds`, `3 hours`, `4 months`."""
    for size, unit in ((30 * 86400, "months"), (86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, round(seconds))} seconds"
